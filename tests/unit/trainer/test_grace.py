"""A save that takes longer than the time after a signal to stop is reported, and launchers tell the run this time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from helpers.checkpoint_examples import make_state
from helpers.config_examples import example

from t5x_like.checkpoints.bucket import BucketCheckpoints
from t5x_like.checkpoints.interface import Checkpoints
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config import CheckpointConfig
from t5x_like.launching.job import Job
from t5x_like.storage.locations import Url
from t5x_like.trainer.grace import too_slow


@pytest.mark.parametrize("kind", ["local", "bucket"])
def test_last_save_is_compared_with_the_grace_time(kind: str, tmp_path: Path) -> None:
    run = dataclasses.replace(example(), checkpoints=CheckpointConfig(grace_seconds=1e-6))
    url = Url(f"memory://{tmp_path.name}/checkpoints")
    checkpoints: Checkpoints = (
        CheckpointManager(tmp_path, run.checkpoints)
        if kind == "local"
        else BucketCheckpoints(url, run.checkpoints, directory=tmp_path)
    )
    assert too_slow(checkpoints, run) is None, "nothing was measured yet"
    checkpoints.save(1, make_state(1), {})
    checkpoints.wait()
    assert checkpoints.save_seconds is not None and checkpoints.save_seconds > 0
    assert "expected at most 1e-06 s (checkpoints.grace_seconds)" in (too_slow(checkpoints, run) or "")
    patient = dataclasses.replace(run, checkpoints=CheckpointConfig(grace_seconds=600.0))
    assert too_slow(checkpoints, patient) is None
    checkpoints.close()


def test_launchers_tell_another_grace_time() -> None:
    assert Job("a", "smoke", "w").grace_seconds == CheckpointConfig().grace_seconds
    assert "--checkpoints.grace-seconds" not in Job("a", "smoke", "w").train("python")
    command = Job("a", "smoke", "w", grace_seconds=30).train("python", "--launcher", "slurm")
    assert command[-2:] == ("--checkpoints.grace-seconds", "30")
    own = Job("a", "smoke", "w", ("--checkpoints.grace-seconds", "20"), grace_seconds=30).train("python")
    assert own.count("--checkpoints.grace-seconds") == 1 and own[-1] == "20"
    own = Job("a", "smoke", "w", ("--checkpoints.grace_seconds=20",), grace_seconds=30).train("python")
    assert own[-1] == "--checkpoints.grace_seconds=20" and "--checkpoints.grace-seconds" not in own
