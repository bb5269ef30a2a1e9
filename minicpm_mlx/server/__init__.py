"""One local HTTP server for the clients of OpenAI, Anthropic, Ollama and SGLang."""
