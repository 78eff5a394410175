"""A run that reads a seqio Mixture live through the trainer: crashed and resumed, it reads exactly what was next."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("seqio")

from seqio_examples import live_config  # noqa: E402

from t5x_like.checkpoints.integrity import check  # noqa: E402
from t5x_like.config import (  # noqa: E402
    AdamW,
    CheckpointConfig,
    ConfigError,
    DataError,
    EvaluationConfig,
    ModelConfig,
    MonitoringConfig,
    RunConfig,
    Schedule,
    StackConfig,
    TrainingConfig,
)
from t5x_like.config.validate import validate  # noqa: E402
from t5x_like.decoding.trained import open_trained  # noqa: E402
from t5x_like.session import Session  # noqa: E402
from t5x_like.trainer import train  # noqa: E402

pytestmark = pytest.mark.slow


def recipe(**changes: Any) -> RunConfig:
    stack = StackConfig(num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=64, positions="rope")
    return RunConfig(
        name="live",
        model=ModelConfig(encoder=stack, decoder=stack, vocab_size=512),
        data=live_config("both"),
        training=TrainingConfig(
            num_train_steps=6,
            batch_size=8,
            optimizer=AdamW(),
            schedule=Schedule(kind="constant", learning_rate=1e-2, warmup_steps=0),
        ),
        checkpoints=CheckpointConfig(save_every_steps=2),
        evaluation=EvaluationConfig(num_batches=2),
        monitoring=MonitoringConfig(log_every_steps=1, tensorboard=False),
        **changes,
    )


class Crash(Exception):
    pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One run without disturbance, and one that crashed at its sixth step, when its fourth was the last saved."""
    place = tmp_path_factory.mktemp("live")
    run = recipe()
    assert validate(run) == []
    assert train(run, place / "whole") == 0
    dispatch = Session.dispatch

    def crash_at_six(session: Session, batch: Any) -> None:
        if session.step == 5:
            session.checkpoints.wait()
            raise Crash
        dispatch(session, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "dispatch", crash_at_six)
        with pytest.raises(Crash):
            train(run, place / "resumed")
    assert sorted(path.name for path in (place / "resumed" / "checkpoints").iterdir()) == ["2", "4"]
    assert train(run, place / "resumed") == 0
    return place / "whole", place / "resumed"


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_is_the_undisturbed_one(runs: tuple[Path, Path]) -> None:
    whole, resumed = ([record["loss"] for record in records(run)] for run in runs)
    assert len(set(whole)) == 6 and resumed == whole
    params = [open_trained(run).params()[1] for run in runs]
    for one, other in zip(*(sorted(_leaves(tree)) for tree in params), strict=True):
        assert one == other


def test_the_position_lies_in_the_checkpoint_under_its_checksums(runs: tuple[Path, Path]) -> None:
    step = runs[0] / "checkpoints" / "6"
    assert [path.name for path in (step / "files").iterdir()] == ["seqio-00000-of-00001.zip"]
    assert check(step) == []
    assert "files/seqio-00000-of-00001.zip" in (step / "SHA256SUMS").read_text()


def test_it_is_evaluated_on_the_tasks_validation_split(runs: tuple[Path, Path]) -> None:
    """Two batches of eight whole examples, of which the i-th has targets of 2 + i % 5 tokens."""
    scores = json.loads((runs[0] / "evaluation.json").read_text())["objectives"]["both"]
    assert np.isfinite(scores["loss"]) and 16 * 2 <= scores["tokens"] <= 16 * 6


def test_what_needs_a_store_says_so(runs: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match="'both' is read live, so there is no prepared store"):
        assert open_trained(runs[0]).store


def test_a_token_table_that_is_too_small_is_refused(tmp_path: Path) -> None:
    run = recipe()
    small = dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=400))
    with pytest.raises(ConfigError, match=r"model.vocab_size: found 400, expected at least 500"):
        train(small, tmp_path / "run")


def test_what_is_for_prepared_stores_is_refused_beside_it() -> None:
    run = recipe()
    data = dataclasses.replace(run.data, short_targets_lengths=(8,), layout="encoder")
    where = {problem.where for problem in validate(dataclasses.replace(run, data=data))}
    assert {"data.short_targets_lengths", "data.targets_length"} <= where


def _leaves(tree: Any) -> list[tuple[str, bytes]]:
    import jax

    return [(str(path), np.asarray(leaf).tobytes()) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
