"""Checkpoints of a run directory are opened for the place where they are."""

from __future__ import annotations

from pathlib import Path

from t5x_like.checkpoints.bucket import BucketCheckpoints
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.checkpoints.opening import broadcast_warning
from t5x_like.config import CheckpointConfig
from t5x_like.storage.locations import Url


def test_broadcast_of_checkpoints_on_a_disk_is_reported(tmp_path: Path) -> None:
    config = CheckpointConfig(load_and_broadcast=True)
    on_disk = CheckpointManager(tmp_path, config, read_only=True)
    in_bucket = BucketCheckpoints(Url(f"memory://{tmp_path.name}/c"), config, directory=tmp_path, read_only=True)
    assert "has no effect" in (broadcast_warning(on_disk, config) or "")
    assert broadcast_warning(in_bucket, config) is None
    assert broadcast_warning(on_disk, CheckpointConfig()) is None
