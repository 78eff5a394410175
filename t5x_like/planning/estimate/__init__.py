"""Estimates of parameters, FLOPs and memory by arithmetic."""
