"""Attention and the loss over the vocabulary, each behind one function. Knows jax only."""
