"""What runs on the device: the loss, the optimizer and a pure training step."""
