"""Reports: HTML pages and images about runs, data and comparisons of checkpoints."""
