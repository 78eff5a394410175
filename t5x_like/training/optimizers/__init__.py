"""Optimizers: one module per configuration class of `config.optimizers`."""
