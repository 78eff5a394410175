"""Optimizer state in bfloat16: its rounding is exact on average, and nothing else differs from float32."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.config import (
    AdafactorConfig,
    AdamWConfig,
    LearningRateGroup,
    OptimizerConfig,
    ScheduleFreeConfig,
    TrainingConfig,
)
from t5x_like.errors import ConfigError
from t5x_like.training.optimizers.make_optimizer import make_optimizer, takes_step
from t5x_like.training.optimizers.rounded_state import stochastically_rounded

AXES = {"a": {"kernel": ("embed", "mlp")}, "b": {"bias": ("mlp",)}}


def config_of(optimizer: OptimizerConfig, **changes: object) -> TrainingConfig:
    config = TrainingConfig(num_train_steps=1, global_batch_size=1, optimizer=optimizer)
    return dataclasses.replace(config, **({"optimizer_state_type": "bfloat16"} | changes))


def tree(seed: int) -> dict[str, dict[str, jax.Array]]:
    rng = np.random.default_rng(seed)
    return {
        "a": {"kernel": jnp.asarray(rng.normal(size=(12, 20)), jnp.float32)},
        "b": {"bias": jnp.asarray(rng.normal(size=20), jnp.float32)},
    }


def test_rounding_takes_a_neighbour_and_is_exact_on_average() -> None:
    x = jnp.asarray([1.0, 1.0 + 2.0**-9, -3.0 - 2.0**-8, 1e-30, -7e20, 0.0, 255.3], jnp.float32)
    count = 40_000
    found = np.asarray(stochastically_rounded(jnp.tile(x, (count, 1)), jax.random.key(0)), np.float64)
    exact = np.asarray(x, np.float64)
    # At most one step of bfloat16 away, which is 2**-7 of the value at most.
    assert np.all(np.abs(found - exact) <= 2.0**-7 * np.abs(exact))
    # What bfloat16 can represent stays as it is.
    assert np.all(found[:, [0, 5]] == exact[[0, 5]]) and len(np.unique(found[:, 1])) == 2
    error = np.abs(found.mean(0) - exact)
    assert np.all(error <= 5 * 2.0**-8 * np.abs(exact) / count**0.5 + 1e-300), error


@pytest.mark.parametrize("optimizer", [AdamWConfig(), AdafactorConfig(min_dim_size_to_factor=1)])
def test_steps_are_those_of_the_optimizer_on_the_rounded_state(optimizer: OptimizerConfig) -> None:
    config = config_of(optimizer)
    rounded, exact = (
        make_optimizer(each, AXES) for each in (config, config_of(optimizer, optimizer_state_type="float32"))
    )
    assert takes_step(config, AXES)
    state = rounded.init(tree(0))
    for step in range(3):
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, state)
        expected, wide = exact.update(tree(step), wide, tree(0), learning_rate=0.1)
        found, state = rounded.update(tree(step), state, tree(0), learning_rate=0.1, step=jnp.int32(step))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        for new, old in zip(jax.tree.leaves(state), jax.tree.leaves(wide), strict=True):
            assert new.dtype == (jnp.bfloat16 if old.ndim >= 2 and old.dtype == jnp.float32 else old.dtype)
            np.testing.assert_allclose(np.asarray(new, np.float64), old, rtol=2.0**-7)
    again = rounded.update(tree(2), state, tree(0), learning_rate=0.1, step=jnp.int32(3))
    jax.tree.map(
        np.testing.assert_array_equal, again, rounded.update(tree(2), state, tree(0), learning_rate=0.1, step=3)
    )


def test_groups_get_their_step_and_schedule_free_is_refused() -> None:
    groups = (LearningRateGroup(paths=("a/.*",), factor=0.5),)
    optimizer = make_optimizer(config_of(AdamWConfig(weight_decay=0.0), learning_rate_groups=groups), AXES)
    updates, state = optimizer.update(tree(0), optimizer.init(tree(0)), tree(0), learning_rate=0.1, step=jnp.int32(0))
    np.testing.assert_allclose(np.abs(updates["a"]["kernel"]), 0.05, rtol=1e-4)
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim == 2} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(ConfigError, match="optimizer_state_type"):
        make_optimizer(config_of(ScheduleFreeConfig()), AXES)
