"""Best steps and early stopping as functions of the recorded scores."""

from __future__ import annotations

from pathlib import Path

import pytest

from t5x_like.config import EarlyStopping, KeepBest
from t5x_like.evaluation.best_checkpoints import best_steps, kept_steps, reason_to_stop
from t5x_like.evaluation.results_store import EVALUATIONS, record

LOSSES = {10: 3.0, 20: 2.0, 30: 2.5, 40: 2.0, 50: 2.9}


def test_best_steps_are_the_first_of_equal_scores() -> None:
    assert best_steps(LOSSES, KeepBest(metric="loss/R")) == [20]
    assert best_steps(LOSSES, KeepBest(metric="loss/R", count=3)) == [20, 40, 30]
    assert best_steps(LOSSES, KeepBest(metric="accuracy/R", direction="max", count=2)) == [10, 50]


def test_kept_steps_are_the_best_of_the_saved_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step, loss in LOSSES.items():
        record(tmp_path, {"step": step, "objectives": {"R": {"loss": loss}}})
    record(tmp_path, {"step": 60, "objectives": {"R": {"loss": float("nan")}}})
    keep = KeepBest(metric="loss/R", count=2)
    assert kept_steps(tmp_path, keep, [10, 30, 40, 45, 60]) == [40, 30]
    assert kept_steps(tmp_path, None, [10, 30]) == ()
    (tmp_path / EVALUATIONS).unlink()
    (tmp_path / EVALUATIONS).mkdir()
    assert kept_steps(tmp_path, keep, [10, 30]) == [10, 30], "nothing is removed without the scores"


@pytest.mark.parametrize(
    "scores, min_delta, stops",
    [
        ([3.0, 2.0, 2.5], 0.0, False),
        ([3.0, 2.0, 2.5, 2.0], 0.0, True),
        ([3.0, 2.0, 2.5, 1.9], 0.0, False),
        ([3.0, 2.0, 2.5, 1.9], 0.2, True),
        ([2.0, None], 0.0, False),
        ([2.0, None, None], 0.0, True),
        ([None, None], 0.0, True),
        ([None, 5.0, 4.0], 0.0, False),
    ],
)
def test_run_stops_after_evaluations_without_improvement(
    scores: list[float | None], min_delta: float, stops: bool
) -> None:
    by_step = {10 * number: score for number, score in enumerate(scores, 1)}
    for direction, sign in (("min", 1), ("max", -1)):
        stopping = EarlyStopping(metric="loss/R", direction=direction, patience=2, min_delta=min_delta)  # type: ignore[arg-type]
        signed = {step: None if score is None else sign * score for step, score in by_step.items()}
        assert (reason_to_stop(signed, stopping) is not None) == stops
