"""Guard of a whole run: rejected steps are recorded, and the policies take effect, also across a restart."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from helpers.recorded_rows import recorded_rows
from helpers.saved_state import saved_state
from helpers.small_run import small_run

from t5x_like.config import CausalLM, CheckpointConfig, CompilationCacheConfig, GuardConfig, MonitoringConfig, RunConfig
from t5x_like.data.store.prepare import prepare
from t5x_like.errors import SafetyError
from t5x_like.monitoring.metrics import WeightedMean
from t5x_like.trainer.session import TrainSession
from t5x_like.trainer.train import train
from t5x_like.utils.jsonl import read_records

STEPS, ROWS = 16, 8
REJECTED = {64}
"""First rows of batches that the guard rejects: that of step 9."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("guard")
    run = small_run(
        root,
        "causal_lm",
        [CausalLM(name="text")],
        lengths=(0, 32),
        training={"num_train_steps": STEPS},
        checkpoints=CheckpointConfig(save_every_steps=4),
        monitoring=MonitoringConfig(log_every_steps=2, writers=(), record_rows=True),
        compilation_cache=CompilationCacheConfig(directory=str(root / "compiled")),
    )
    prepare(run.data, report=lambda line: None)
    return run


Trainer = Callable[..., list[tuple[int, int]]]


@pytest.fixture
def train_with(run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """Return a function that trains with a policy and returns (step, first row) of each step that was begun."""

    def train_with(policy: str, rejected: set[int] = REJECTED, end_at: int | None = None, **guard: Any) -> Any:
        begun: list[tuple[int, int]] = []
        last: dict[str, WeightedMean] = {}

        def step(self: TrainSession, batch: Any) -> None:
            row = self.rows_read(self.step)
            begun.append((self.step + 1, row))
            if len(begun) == end_at:
                raise ZeroDivisionError("the process ends here")
            if row not in rejected:
                original(self, batch)
                last.update(self.in_flight[-1])
                return
            # What the device does in a rejected step, whose computation other tests cover.
            nan, one = jnp.float32(jnp.nan), jnp.float32(1)
            self.state = {**self.state, "step": self.state["step"] + 1}
            self.in_flight.append({**last, "loss": WeightedMean(nan, one), "skipped_steps": WeightedMean(one, one)})
            self.step += 1

        monkeypatch.setattr(TrainSession, "train_step", step)
        config = GuardConfig(policy=policy, **guard)  # type: ignore[arg-type]
        guarded = dataclasses.replace(run, training=dataclasses.replace(run.training, guard=config))
        try:
            train(guarded, tmp_path)
        finally:
            monkeypatch.setattr(TrainSession, "train_step", original)
        return begun

    original = TrainSession.train_step
    return train_with


def in_order(first_step: int, last_step: int, first_row: int) -> list[tuple[int, int]]:
    return [(step, first_row + ROWS * (step - first_step)) for step in range(first_step, last_step + 1)]


@pytest.mark.slow
def test_skipped_steps_are_recorded_with_their_rows(train_with: Trainer, tmp_path: Path) -> None:
    assert train_with("skip") == in_order(1, STEPS, 0)
    (rejected,) = read_records(tmp_path / "rejected_steps.jsonl").records
    assert (rejected["step"], rejected["first_row"], rejected["last_row"]) == (9, 64, 71)
    assert "not finite" in rejected["reason"]
    shares = {line["step"]: line["skipped_steps"] for line in read_records(tmp_path / "metrics.jsonl").records}
    assert shares.pop(10) == 0.5 and set(shares.values()) == {0.0}


def test_abort_ends_the_run_and_names_step_rows_and_healthy_checkpoint(train_with: Trainer, tmp_path: Path) -> None:
    """The checkpoint of step 8 was followed by no applied step, that of step 4 by four."""
    with pytest.raises(SafetyError, match=r"step 9 had .* \(rows 64 to 71\)\. .* applied steps is that of step 4\."):
        train_with("abort")
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == 3


def test_rollback_passes_over_the_rows_and_a_restart_changes_nothing(
    train_with: Trainer, tmp_path: Path, run: RunConfig
) -> None:
    """From step 9 back to the healthy checkpoint of step 4, and on with the rows after those of step 9."""
    begun = train_with("rollback")
    expected = [*in_order(1, 11, 0)[: begun.index((5, 72))], *in_order(5, STEPS, 72)]
    assert begun == expected and 9 <= begun.index((5, 72)) <= 11
    records = read_records(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in records.records] == list(range(2, STEPS + 1, 2)) and not records.gaps
    rows = recorded_rows(tmp_path)
    assert [index for step in sorted(rows) for _, index, _ in rows[step]] == [*range(32), *range(72, 72 + 12 * ROWS)]
    assert json.loads((tmp_path / "run.json").read_text())["rollbacks"] == [[4, 9, 72]]
    whole = saved_state(tmp_path, STEPS)

    for name in ("checkpoints", "run.json", "metrics.jsonl", "evaluations.jsonl", "rows.jsonl"):
        (tmp_path / name).rename(tmp_path / f"of_the_whole_{name}")
    with pytest.raises(ZeroDivisionError):
        train_with("rollback", end_at=begun.index((5, 72)) + 3)
    assert train_with("rollback") == in_order(5, STEPS, 72)
    resumed = saved_state(tmp_path, STEPS)
    assert recorded_rows(tmp_path) == rows
    assert all(resumed[path].tobytes() == whole[path].tobytes() for path in whole)


def test_too_many_rollbacks_end_the_run(train_with: Trainer) -> None:
    with pytest.raises(SafetyError, match="there were 2 rollbacks already"):
        train_with("rollback", rejected=set(range(64, 1000, ROWS)), max_rollbacks=2)


def test_rollback_without_a_healthy_checkpoint_ends_the_run(train_with: Trainer) -> None:
    with pytest.raises(SafetyError, match="step 3 was rejected, and there is no healthy checkpoint"):
        train_with("rollback", rejected={16})
