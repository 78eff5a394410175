"""Layers, stacks, the model, its presets and its arithmetic. `presets` and `parameters` do not import jax."""
