"""Disk space of a run's checkpoints, checked before the first step, and the reason of a write that failed."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from t5x_like.config.run import CheckpointConfig
from t5x_like.errors import SafetyError, UserError
from t5x_like.faults import write_error

_OVERHEAD_BYTES = 1 << 20
"""Size of the metadata and checksums of one checkpoint."""


def state_bytes(state: Any) -> int:
    """Return the bytes of all arrays of a (possibly abstract) tree: the size of a checkpoint."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def used_bytes(directory: Path) -> int:
    """Return the bytes of the checkpoints in `directory`, unfinished ones included; 0 if it does not exist."""
    names = directory.glob("[0-9]*")
    return sum(path.stat().st_size for name in names for path in name.rglob("*") if path.is_file())


def checkpoints_at_once(config: CheckpointConfig, num_train_steps: int | None = None) -> int:
    """Return the maximum number of checkpoints on the disk at the same time: those kept and the one being written.

    Args:
      config: Which checkpoints are kept.
      num_train_steps: Length of the run. If None, checkpoints that are kept forever are not counted.
    """
    # Besides the newest one, the newest healthy one is kept.
    at_once = max(config.max_to_keep, 2) + 1
    if num_train_steps is None:
        return at_once
    if config.keep_best is not None:
        at_once += config.keep_best.count
    if config.keep_period is not None:
        at_once += num_train_steps // config.keep_period
    # One at each multiple of the interval, and one at the end if the end is not a multiple.
    return min(at_once, math.ceil(num_train_steps / config.save_every_steps))


def require_free_space(
    directory: Path, state_bytes: int, config: CheckpointConfig, num_train_steps: int | None = None
) -> None:
    """Check that the checkpoints of a run fit on the disk. Existing checkpoints in `directory` count as the run's own.

    Args:
      directory: Directory of the checkpoints; it need not exist yet.
      state_bytes: Bytes of one checkpoint's arrays.
      config: Which checkpoints are kept.
      num_train_steps: See `checkpoints_at_once`.

    Raises:
      SafetyError: the disk is too small; nothing was written.
    """
    at_once = checkpoints_at_once(config, num_train_steps)
    needed = max(at_once * (state_bytes + _OVERHEAD_BYTES) - used_bytes(directory), 0)
    # The directory may not exist yet; the nearest existing parent is on the same disk.
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise SafetyError(
            f"not enough disk space for the checkpoints in {directory}: {needed:,} bytes are needed "
            f"({at_once} checkpoints of {state_bytes:,} bytes, minus the existing ones), {free:,} bytes are free. "
            f"Free some space, choose another --workdir, "
            f"or keep fewer (checkpoints.max_to_keep is {config.max_to_keep})."
        )


def failed_save(
    directory: Path, step: int, reason: str, error: Exception, size: int, intact_steps: Sequence[int]
) -> UserError:
    """Return the error for a checkpoint of `size` bytes that could not be written; its remains have been removed."""
    free = shutil.disk_usage(directory).free
    message = (
        f"the checkpoint of step {step} was not written to {directory}: {reason}. A checkpoint needs about {size:,} "
        f"bytes, {free:,} are free after its remains were removed. Earlier checkpoints are intact, steps: "
        f"{intact_steps or 'none'}. Fix the problem and run the same command again."
    )
    return write_error(message, error)


def disk_reason(error: BaseException | None, directory: Path) -> str | None:
    """Return the operating system's reason for a failed write, or None if the error has another reason.

    TensorStore reports the reason in the message only.

    Args:
      error: The error of the write.
      directory: Directory on the file system that was written to, to tell files that are too many from bytes.
    """
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return _with_inodes(error.strerror, directory)
        reason = re.search(
            r"(No space left on device|Disk quota exceeded|Read-only file system|File too large)", str(error)
        )
        if reason:
            return _with_inodes(reason[0], directory)
        # Orbax and TensorStore wrap the error of the operating system, sometimes several times.
        error = error.__cause__ or error.__context__
    return None


def _with_inodes(reason: str, directory: Path) -> str:
    """Return the reason, and that no inodes are free if this is so."""
    try:
        found = os.statvfs(directory)
    except OSError:
        return reason
    # Some file systems have no table of inodes; they report 0 of 0.
    return f"{reason} (no inodes are free: too many files)" if found.f_files and not found.f_favail else reason
