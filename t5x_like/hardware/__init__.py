"""Accelerators, topologies, and fake devices that stand for a topology."""
