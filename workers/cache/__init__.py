"""Blocks of the KV-cache: ids, reference counts, and the prefix tree. Integers only; no torch."""
