"""A run that reads a seqio Mixture live: after a crash it resumes with exactly the next batch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("seqio")

from helpers.seqio_examples import live_config  # noqa: E402

from t5x_like.checkpoints.checksums import verify_checksums  # noqa: E402
from t5x_like.config import (
    AdamWConfig,
    CheckpointConfig,
    EvaluationConfig,
    ModelConfig,
    MonitoringConfig,
    RunConfig,
    ScheduleConfig,
    StackConfig,
    TrainingConfig,
)
from t5x_like.config.validation import validate  # noqa: E402
from t5x_like.errors import ConfigError, DataError
from t5x_like.model_loading import open_model  # noqa: E402
from t5x_like.trainer.session import TrainSession  # noqa: E402
from t5x_like.trainer.train import train  # noqa: E402

pytestmark = pytest.mark.slow


def recipe(**changes: Any) -> RunConfig:
    stack = StackConfig(num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=64, positions="rope")
    return RunConfig(
        name="live",
        model=ModelConfig(encoder=stack, decoder=stack, vocab_size=512),
        data=live_config("both"),
        training=TrainingConfig(
            num_train_steps=6,
            global_batch_size=8,
            optimizer=AdamWConfig(),
            schedule=ScheduleConfig(kind="constant", learning_rate=1e-2, warmup_steps=0),
        ),
        checkpoints=CheckpointConfig(save_every_steps=2),
        evaluation=EvaluationConfig(num_batches=2),
        monitoring=MonitoringConfig(log_every_steps=1, writers=()),
        **changes,
    )


class Crash(Exception):
    pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return an uninterrupted run, and one that crashed at step 6 with step 4 as its last checkpoint."""
    root = tmp_path_factory.mktemp("live")
    run = recipe()
    assert validate(run) == []
    assert train(run, root / "whole") == 0
    train_step = TrainSession.train_step

    def crash_at_six(session: TrainSession, batch: Any) -> None:
        if session.step == 5:
            session.checkpoints.wait()
            raise Crash
        train_step(session, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainSession, "train_step", crash_at_six)
        with pytest.raises(Crash):
            train(run, root / "resumed")
    assert sorted(path.name for path in (root / "resumed" / "checkpoints").iterdir()) == ["2", "4", "run_id"]
    assert train(run, root / "resumed") == 0
    return root / "whole", root / "resumed"


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_resumed_run_equals_the_uninterrupted_one(runs: tuple[Path, Path]) -> None:
    whole, resumed = ([record["loss"] for record in records(run)] for run in runs)
    assert len(set(whole)) == 6 and resumed == whole
    params = [open_model(run).params()[1] for run in runs]
    for one, other in zip(*(sorted(_leaves(tree)) for tree in params), strict=True):
        assert one == other


def test_pipeline_state_is_in_the_checkpoint_with_checksums(runs: tuple[Path, Path]) -> None:
    step = runs[0] / "checkpoints" / "6"
    assert [path.name for path in (step / "files").iterdir()] == ["seqio-00000-of-00001.zip"]
    assert verify_checksums(step) == []
    assert "files/seqio-00000-of-00001.zip" in (step / "SHA256SUMS").read_text()


def test_live_run_is_evaluated_on_the_tasks_validation_split(runs: tuple[Path, Path]) -> None:
    """Two batches of eight complete examples, the i-th of which has 2 + i % 5 target tokens."""
    scores = json.loads((runs[0] / "evaluation.json").read_text())["objectives"]["both"]
    assert np.isfinite(scores["loss"]) and 16 * 2 <= scores["tokens"] <= 16 * 6


def test_commands_that_need_a_store_report_it(runs: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match="'both' is read live, so there is no prepared store"):
        assert open_model(runs[0]).store


def test_too_small_embedding_table_is_refused(tmp_path: Path) -> None:
    run = recipe()
    small = dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=400))
    with pytest.raises(ConfigError, match=r"model.vocab_size: found 400, expected at least 500"):
        train(small, tmp_path / "run")


def test_settings_for_prepared_stores_are_refused_with_live_data() -> None:
    run = recipe()
    data = dataclasses.replace(run.data, targets_length_buckets=(8,), layout="encoder")
    where = {problem.where for problem in validate(dataclasses.replace(run, data=data))}
    assert {"data.targets_length_buckets", "data.targets_length"} <= where


def _leaves(tree: Any) -> list[tuple[str, bytes]]:
    import jax

    return [(str(path), np.asarray(leaf).tobytes()) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
