"""Utilities that import no other package except errors."""
