"""Embedding of texts as vectors: `t5x-like embed`."""
