"""The server LLM: an OpenAI-compatible endpoint, or a model of this machine behind a server on loopback."""
