"""The training loop and the session around it."""
