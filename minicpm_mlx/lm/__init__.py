"""The public API, text in and text out: `LM`, chats, sessions and structured output.

`engine` below it knows token ids only.
"""
