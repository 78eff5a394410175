"""Learning rates against their closed forms and optax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_like.config import ScheduleConfig, TrainingConfig
from t5x_like.training.schedules import make_schedule


def rates(schedule: ScheduleConfig, steps: int = 100) -> np.ndarray:
    config = TrainingConfig(num_train_steps=steps, global_batch_size=1, schedule=schedule)
    return np.asarray(jax.vmap(make_schedule(config))(jnp.arange(steps)))


def test_rsqrt_is_the_schedule_of_t5_without_a_ramp() -> None:
    values = rates(ScheduleConfig(kind="rsqrt", learning_rate=1.0, warmup_steps=10_000), 20_000)
    np.testing.assert_allclose(values[:10_001], 0.01, rtol=1e-6)
    np.testing.assert_allclose(values[-1], 1 / np.sqrt(19_999), rtol=1e-6)


def test_constant_ramps_up_and_stays() -> None:
    values = rates(ScheduleConfig(kind="constant", learning_rate=3.0, warmup_steps=10))
    np.testing.assert_allclose(values[:10], 3.0 * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(values[10:], 3.0)


def test_cosine_is_optax_after_the_warm_up_and_does_not_restart() -> None:
    schedule = ScheduleConfig(kind="cosine", learning_rate=2.0, warmup_steps=20, decay_steps=80, final_fraction=0.1)
    values = rates(schedule, 200)
    expected = optax.cosine_decay_schedule(2.0, 60, alpha=0.1)(jnp.arange(180))
    np.testing.assert_allclose(values[20:], expected, rtol=1e-5)
    np.testing.assert_allclose(values[80:], 0.2, rtol=1e-5)
    assert np.all(np.diff(values[:20]) > 0)


def test_wsd_is_flat_then_linear_to_the_final_fraction() -> None:
    schedule = ScheduleConfig(
        kind="wsd", learning_rate=1.0, warmup_steps=10, cooldown_fraction=0.25, final_fraction=0.2
    )
    values = rates(schedule, 101)
    np.testing.assert_allclose(values[9:76], 1.0, rtol=1e-6)
    np.testing.assert_allclose(values[75:], 1.0 - 0.8 * np.clip((np.arange(75, 101) - 75.75) / 25.25, 0, 1), rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ("one_minus_sqrt", 1 - np.sqrt([0, 0.25, 0.5, 0.75])),
        ("cosine", np.cos(np.pi * np.array([0, 0.25, 0.5, 0.75]) / 2) ** 2),
        ("square", [1, 0.9375, 0.75, 0.4375]),
    ],
)
def test_wsd_cools_down_in_the_chosen_shape(shape: Any, values: Any) -> None:
    schedule = ScheduleConfig(
        kind="wsd", learning_rate=2.0, warmup_steps=1, cooldown_fraction=0.4, cooldown_shape=shape, final_fraction=0.5
    )
    found = rates(schedule, 100)[60::10]
    np.testing.assert_allclose(found, 2.0 * (0.5 + 0.5 * np.asarray(values)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["constant", "rsqrt", "cosine", "wsd"])
def test_no_warm_up_starts_at_the_peak(kind: str) -> None:
    values = rates(ScheduleConfig(kind=kind, learning_rate=0.5, warmup_steps=0))  # type: ignore[arg-type]
    assert values[0] == 0.5
    assert np.all(np.isfinite(values)) and values.dtype == np.float32
