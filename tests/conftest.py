"""One pytest process has eight CPU devices: tests of meshes use them all, the others the first."""

from __future__ import annotations

import os

# Tests compile much and compute little, here and in the processes that they start: fast machine code costs more than it
# brings. To be set before jax is imported.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
