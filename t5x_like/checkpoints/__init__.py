"""Checkpoints: saving in the background, verified and strict restoring, and the room they need on the disk."""
