"""From a Hugging Face checkpoint to a forward over rows of tokens."""
