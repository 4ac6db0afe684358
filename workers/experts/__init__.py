"""Experts on hosts of their own: which host has which, the host, the channel to it, and the sending of rows there."""
