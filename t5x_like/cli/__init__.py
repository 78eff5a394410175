"""The commands, a light module each: `register(commands)` adds its arguments; only its own function imports jax."""
