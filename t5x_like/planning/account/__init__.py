"""Accounts of models: what they cost to train and to serve, beside the common formulas and what these leave out."""
