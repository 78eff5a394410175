"""Checkpoints of a run directory, on a disk or in an object store."""

from __future__ import annotations

from pathlib import Path

from t5x_like.checkpoints.bucket import BucketCheckpoints
from t5x_like.checkpoints.interface import Checkpoints, Kept
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config.run import CheckpointConfig
from t5x_like.run_directory import CHECKPOINTS, RunRecord
from t5x_like.storage.mirror import mirror_of


def open_checkpoints(
    run_dir: Path,
    config: CheckpointConfig,
    *,
    read_only: bool = False,
    record: RunRecord | None = None,
    kept: Kept = lambda steps: (),
) -> Checkpoints:
    """Return the checkpoints of the run or model in a directory.

    Args:
      run_dir: The directory, which may be the local copy of one in an object store.
      config: Which checkpoints are kept.
      read_only: Change nothing, for reading another run's checkpoints.
      record: Record of the run, which writes its id to the checkpoints; None for an imported model.
      kept: Returns which of the saved steps are kept although newer ones exist.
    """
    directory, mirror = run_dir / CHECKPOINTS, mirror_of(run_dir)
    if mirror is None or mirror.has_local_checkpoints:
        return CheckpointManager(directory, config, read_only=read_only, record=record, kept=kept)
    return BucketCheckpoints(
        mirror.url / CHECKPOINTS,
        config,
        directory=directory,
        read_only=read_only,
        record=record,
        kept=kept,
        # What a resumed run needs beside the checkpoint, its metrics for example, is stored before it.
        before_commit=mirror.upload,
    )


def broadcast_warning(checkpoints: Checkpoints, config: CheckpointConfig) -> str | None:
    """Return a warning if a run asks for restores by one replica that its checkpoints do not have; None otherwise."""
    if not config.load_and_broadcast or isinstance(checkpoints, BucketCheckpoints):
        return None
    return (
        f"{checkpoints.directory}: checkpoints.load_and_broadcast has no effect on checkpoints on a disk, expected a "
        "run directory in a bucket: each process reads what its devices need"
    )
