"""A model behind HTTP: an OpenAI-compatible completions endpoint over continuous batching."""
