"""Evaluation of trained models: held-out loss, metrics of Tasks, lm-eval, and comparison of checkpoints."""
