"""The API of OpenAI: its routes, schemas and replies."""
