"""The API of SGLang: its routes, schemas and replies."""
