"""Export: StableHLO with a loader that needs only jax, int8 weights, and Hugging Face directories."""
