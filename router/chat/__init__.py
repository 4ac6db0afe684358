"""Conversations: messages to a prompt by the checkpoint's template, an answer's text to thought, speech and calls."""
