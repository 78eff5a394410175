"""Ahead-of-time compilation for TPUs, and the analysis of XLA's reports and program texts."""
