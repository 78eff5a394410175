"""Checkpoints of other frameworks: Hugging Face in both directions, T5X into this one, and warm starts."""
