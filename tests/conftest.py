"""One pytest process has eight CPU devices: tests of meshes use them all, the others the first."""

from __future__ import annotations

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
