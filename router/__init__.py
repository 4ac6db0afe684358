"""Requests in, streams out: gateway, text, routing. Importing this brings no torch."""
