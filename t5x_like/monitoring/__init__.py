"""Metrics, and what is written of them. Knows no other room but the configuration."""
