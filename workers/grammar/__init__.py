"""Answers that keep to a format: JSON schema, any JSON object, regular expression, grammar, choice.

Compiled and followed by llguidance; what it cannot hold is refused with its reason. No torch here. `formats` imports
the library; `vocabulary` does not, for it serves all text.
"""
