"""Pages about what a run reads."""
