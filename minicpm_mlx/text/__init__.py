"""Tokenizers and chat templates: text to token ids and back. Any package above may import it."""
