"""The transformer: layers, stacks, heads, decoding cache, presets and the construction of models."""
