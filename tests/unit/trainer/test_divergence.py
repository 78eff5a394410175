"""A loss that rises slowly is found, and neither noise, a plateau nor a spike that heals by itself."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest
from helpers.config_examples import example

from t5x_like.config import GuardConfig
from t5x_like.errors import SafetyError
from t5x_like.monitoring.metrics import WeightedMean
from t5x_like.trainer.divergence import DivergenceDetector, Rise
from t5x_like.trainer.step_guard import StepGuard

WINDOW, THRESHOLD, STEPS = 32, 8.0, 3200


def rises(loss_of: Callable[[int], float]) -> list[tuple[int, Rise]]:
    """Return the reported rises by step, of a loss with normal noise."""
    noise = random.Random(0)
    detector = DivergenceDetector(WINDOW, THRESHOLD)
    found = [(step, detector.add(step, loss_of(step) + noise.gauss(0, 0.05))) for step in range(1, STEPS + 1)]
    return [(step, rise) for step, rise in found if rise is not None]


@pytest.mark.parametrize(
    "loss_of",
    [
        lambda step: 6 / step**0.2,
        lambda step: 2.0,
        lambda step: 2.0 + (5.0 if 1000 <= step < 1010 else 0.0),  # Heals within a window.
    ],
    ids=["falling", "constant", "spike that heals"],
)
def test_runs_without_a_rise(loss_of: Callable[[int], float]) -> None:
    assert rises(loss_of) == []


def test_slow_divergence_is_reported_when_it_begins_and_when_it_has_doubled() -> None:
    """From step 1600 on the loss rises by 0.001 per step, a fiftieth of its noise."""
    found = rises(lambda step: 2.0 + max(step - 1600, 0) * 0.001)
    steps = [step for step, _ in found]
    assert 1900 < steps[0] < 2200 and steps == sorted(steps) and 2 <= len(steps) <= 3
    assert all(rise.since <= 1632 and rise.lowest == pytest.approx(2.0, abs=0.05) for _, rise in found)
    assert found[1][1].median - 2 > 1.8 * (found[0][1].median - 2)


def test_recovery_ends_the_rise() -> None:
    detector = DivergenceDetector(2, THRESHOLD)
    reported = [detector.add(step, loss) for step, loss in enumerate([1.0, 1.0, 3.0, 3.0, 1.0, 1.0, 3.0, 3.0], 1)]
    assert [step for step, rise in enumerate(reported, 1) if rise is not None] == [4, 8] and detector.is_rising


@pytest.mark.parametrize("policy", ["skip", "abort"])
def test_guard_reports_a_rise_and_no_further_checkpoint_is_healthy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, policy: Any
) -> None:
    run = example()
    guard = GuardConfig(policy=policy, spike_threshold=THRESHOLD, spike_window=8)
    run = dataclasses.replace(
        run,
        training=dataclasses.replace(run.training, guard=guard),
        monitoring=dataclasses.replace(run.monitoring, log_every_steps=4),
    )
    checkpoints: Any = SimpleNamespace(protected=None)
    step_guard = StepGuard(run, tmp_path, checkpoints, saved_steps=[4, 12])

    def check(step: int, loss: float, skipped: int = 0) -> None:
        one = jnp.ones(())
        metrics = {"loss": WeightedMean(loss * one, one), "skipped_steps": WeightedMean(skipped * one, one)}
        step_guard.check(step, metrics, range(8 * step - 8, 8 * step))

    for step in range(5, 13):
        check(step, 2.0)
    assert step_guard.healthy_step == checkpoints.protected == 4
    reported = "its median over the 8 steps up to 20 is 3, and was 2 up to step 12"
    for step in range(13, 20):
        check(step, 3.0)
    step_guard.saved(20)
    with caplog.at_level(logging.WARNING):
        if policy == "abort":
            with pytest.raises(SafetyError, match=reported):
                check(20, 3.0)
            return
        for step in range(20, 30):
            check(step, 3.0)
        # A rejected step does not end the rise.
        check(30, 3.0, skipped=1)
    assert [record.getMessage() for record in caplog.records if reported in record.getMessage()]
    assert step_guard.healthy_step == checkpoints.protected == 12
