"""Attention, cross-entropy, matrix products and dropout as functions of arrays, independent of models and configs."""
