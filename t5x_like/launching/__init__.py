"""Launching: files and commands that start a run on other machines, and the local launcher."""
