"""Reads keys at the terminal, with prompt_toolkit: a message, or a choice from a list."""
