"""How good a trained model is on held-out text, and beside what."""
