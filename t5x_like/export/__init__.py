"""Models for other programs: StableHLO with a loader that needs jax alone, weights in fewer bits."""
