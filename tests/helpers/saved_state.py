"""Arrays of a run's checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.checkpoints.bucket import BucketCheckpoints
from t5x_like.checkpoints.opening import open_checkpoints
from t5x_like.config import CheckpointConfig
from t5x_like.storage import locations
from t5x_like.utils import tree_paths


def saved_state(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Return all arrays of a checkpoint by path: parameters, optimizer, step and random key.

    Args:
      workdir: The run directory, or the local copy of one in a bucket.
      step: Step of the checkpoint.
    """
    manager = open_checkpoints(workdir, CheckpointConfig(), read_only=True)
    if isinstance(manager, BucketCheckpoints):
        text = locations.read_bytes(manager.url / "committed" / f"{step}.json") or b""
    else:
        text = (workdir / "checkpoints" / str(step) / "meta.json").read_bytes()
    record = json.JSONDecoder().raw_decode(text.decode())[0]
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaves = {}
    for path, description in record["state"].items():
        dtype, shape = description.removesuffix("]").split("[")
        dimensions = tuple(int(size) for size in shape.split(",") if size)
        leaves[path] = jax.ShapeDtypeStruct(dimensions, jnp.dtype(dtype), sharding=device)
    _, state, _ = manager.restore(tree_paths.nested(leaves), step=step)
    manager.close()
    return {path: np.asarray(leaf) for path, leaf in tree_paths.by_path(state).items()}
