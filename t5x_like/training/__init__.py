"""Computation on the device: loss, optimizer, schedule, and a pure training step."""
