"""Monitoring: metrics of a run and their writers. Of this package it imports `utils` only."""
