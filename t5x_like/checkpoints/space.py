"""The room that a run's checkpoints need on the disk, known before the first step."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import jax

from t5x_like.config.errors import RefusedError
from t5x_like.config.run import CheckpointConfig

_OVERHEAD_BYTES = 1 << 20
"""Metadata and checksums beside the arrays of one checkpoint."""


def state_bytes(state: Any) -> int:
    """Bytes of all arrays of a (possibly abstract) tree: what one checkpoint takes, for it is saved uncompressed."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def used_bytes(directory: Path) -> int:
    """Bytes of the checkpoints in `directory`, finished or not; 0 if it is not there. Other files do not count."""
    names = directory.glob("[0-9]*")
    return sum(path.stat().st_size for name in names for path in name.rglob("*") if path.is_file())


def checkpoints_at_once(config: CheckpointConfig, num_train_steps: int | None = None) -> int:
    """The most checkpoints that are on the disk at the same time: those that are kept and the one being written.

    Args:
      config: The policies.
      num_train_steps: Length of the run. Without it, checkpoints that stay for good are not counted.
    """
    at_once = config.keep_last + 1
    if num_train_steps is None:
        return at_once
    if config.keep_every_steps is not None:
        at_once += num_train_steps // config.keep_every_steps
    # One at each multiple of the interval and one at the end, if the end is no multiple.
    return min(at_once, math.ceil(num_train_steps / config.save_every_steps))


def require_free_space(
    directory: Path, state_bytes: int, config: CheckpointConfig, num_train_steps: int | None = None
) -> None:
    """Checks that the disk can hold the checkpoints of a run. Those that are there already are counted as its own.

    Args:
      directory: Where the checkpoints go; need not exist yet.
      state_bytes: Bytes of one checkpoint's arrays.
      config: How many checkpoints are kept.
      num_train_steps: See `checkpoints_at_once`.

    Raises:
      RefusedError: the disk is too small; nothing was written.
    """
    at_once = checkpoints_at_once(config, num_train_steps)
    needed = max(at_once * (state_bytes + _OVERHEAD_BYTES) - used_bytes(directory), 0)
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise RefusedError(
            f"no room for the checkpoints in {directory}: {needed:,} bytes are needed ({at_once} checkpoints of "
            f"{state_bytes:,} bytes, less what is there), {free:,} bytes are free. Free some space, choose another "
            f"--workdir, or keep fewer (checkpoints.keep_last is {config.keep_last})."
        )
