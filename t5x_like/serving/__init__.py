"""HTTP server with an OpenAI-compatible completions endpoint, on continuous batching."""
