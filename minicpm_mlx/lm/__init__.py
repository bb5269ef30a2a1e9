"""The language model a caller holds: text in, text out; chats, sessions and structured output."""
