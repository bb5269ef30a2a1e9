"""The API of Ollama: its routes, schemas and replies."""
