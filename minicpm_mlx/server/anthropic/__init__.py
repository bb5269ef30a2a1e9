"""The API of Anthropic: its routes, schemas and replies."""
