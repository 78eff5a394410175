"""Parameters that a checkpoint holds in bfloat16 and that are read in float32, which changes no value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def as_stored(leaves: Mapping[str, Any], saved: Mapping[str, str]) -> dict[str, Any]:
    """Return the wanted arrays, as `jax.ShapeDtypeStruct`s by path, with the type in which the checkpoint holds them if
    that is bfloat16 and float32 is wanted.

    Args:
      leaves: Wanted arrays by path.
      saved: Description of the checkpoint's arrays (`tree_paths.describe`).
    """

    def one(path: str, leaf: Any) -> Any:
        if leaf.dtype == jnp.float32 and saved.get(path, "").startswith("bfloat16["):
            return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=leaf.sharding)
        return leaf

    return {path: one(path, leaf) for path, leaf in leaves.items()}


def as_wanted(arrays: Mapping[str, jax.Array], leaves: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Return the arrays that were read in the types of the wanted ones."""
    return {
        path: array if array.dtype == leaves[path].dtype else array.astype(leaves[path].dtype)
        for path, array in arrays.items()
    }
