"""Checkpoints: saving in the background, verified and strict restoring, and the disk space that they need."""
