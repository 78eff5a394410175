"""Texts to vectors: `t5x-like embed`."""
