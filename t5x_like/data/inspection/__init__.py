"""Inspection of token stores and training rows: statistics, and the console view of the command `inspect`."""
