"""Small training states and their digests."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def make_state(step: int, size: int = 64) -> dict[str, Any]:
    key = jax.random.fold_in(jax.random.key(0), step)
    kernel = jax.random.normal(key, (size, 32))
    return {"params": {"head": {"kernel": kernel}}, "opt_state": ({"mu": kernel * 0.1},), "step": jnp.int32(step)}


def digest(tree: Any) -> str:
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))).hexdigest()
