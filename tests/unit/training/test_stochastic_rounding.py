"""Parameters and optimizer state in bfloat16: their rounding is exact on average, and nothing else differs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.training_examples import VOCABULARY, batch_of, run_with
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
from t5x_like.training.schedules import make_schedule
from t5x_like.training.stochastic_rounding import rounded_like, stochastically_rounded, widened
from t5x_like.training.train_step import init_state, make_train_step
from t5x_like.utils.type_aliases import PyTree

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
    for field in ("optimizer_state_type", "parameter_type"):
        with pytest.raises(ConfigError, match=field):
            changes = {"optimizer_state_type": "float32"} | {field: "bfloat16"}
            make_optimizer(config_of(ScheduleFreeConfig(), **changes), AXES)


def test_random_numbers_do_not_depend_on_the_sharding() -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("fsdp",))
    x, key = {"a": tree(0)["a"]["kernel"], "b": tree(1)["a"]["kernel"]}, jax.random.key(3)
    old = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), x)
    found = jax.jit(rounded_like)(x, old, key)
    for spec in (PartitionSpec("fsdp"), PartitionSpec(None, "fsdp")):
        split = jax.jit(rounded_like, out_shardings=NamedSharding(mesh, spec))(
            jax.device_put(x, NamedSharding(mesh, spec)), old, key
        )
        jax.tree.map(np.testing.assert_array_equal, split, found)
    # Each array has numbers of its own, and so has each key.
    same = {"a": x["a"], "b": x["a"]}
    first, second = (rounded_like(same, old, jax.random.key(seed)) for seed in (3, 4))
    assert np.any(first["a"] != first["b"]) and np.any(first["a"] != second["a"])


def apply(params: PyTree, batch: PyTree, rng: jax.Array | None) -> jax.Array:
    return params["table"]["embedding"][batch["decoder_input_tokens"]].astype(jnp.float32)


def step_with(updates: PyTree, **training: Any) -> tuple[Any, Any]:
    """Return the state of a table of logits before the first step, and the step with constant updates."""
    run = run_with(parameter_type="bfloat16", **training)
    optimizer = optax.GradientTransformationExtraArgs(
        lambda params: {}, lambda grads, state, params=None, *, learning_rate: (updates, state)
    )
    table = np.random.default_rng(0).standard_normal((VOCABULARY, VOCABULARY)).astype(np.float32)
    averaged = run.training.ema_decay is not None
    state = init_state(
        {"table": {"embedding": jnp.asarray(table)}}, optimizer, 0, parameter_type="bfloat16", averaged=averaged
    )
    return state, make_train_step(run, apply, optimizer, make_schedule(run.training))


def test_mean_of_many_rounded_steps_is_the_step_in_float32() -> None:
    rng = np.random.default_rng(1)
    change = (1e-3 * rng.standard_normal((VOCABULARY, VOCABULARY))).astype(np.float32)
    state, step = step_with({"table": {"embedding": jnp.asarray(change)}})
    seeds = 4_000
    keys = jax.vmap(lambda seed: jax.random.key_data(jax.random.key(seed)))(jnp.arange(seeds))
    axes = {name: 0 if name == "rng" else None for name in state}
    many, _ = jax.jit(jax.vmap(step, in_axes=(axes, None)))(state | {"rng": keys}, batch_of())
    found = np.asarray(many["params"]["table"]["embedding"].astype(jnp.float32), np.float64)
    assert many["params"]["table"]["embedding"].dtype == jnp.bfloat16
    before = np.asarray(widened(state["params"])["table"]["embedding"], np.float64)
    # Each value is one of the two neighbours, whose distance is at most 2**-7 of it: the standard deviation of a mean
    # is at most half of that by the root of the number of seeds.
    bound = 5 * 0.5 * 2.0**-7 * np.abs(before + change) / seeds**0.5
    assert np.all(np.abs(found.mean(0) - (before + change)) <= bound)
    # Rounding to the nearest number would lose most of these changes.
    assert np.mean(np.asarray(jnp.asarray(before + change, jnp.bfloat16), np.float64) == before) > 0.5


def test_rounding_follows_from_seed_and_step_and_the_average_is_float32() -> None:
    change = {"table": {"embedding": jnp.full((VOCABULARY, VOCABULARY), 1e-3)}}
    state, step = step_with(change, ema_decay=0.5, gradient_accumulation_steps=2)
    assert state["ema"]["table"]["embedding"].dtype == jnp.float32
    np.testing.assert_array_equal(state["ema"]["table"]["embedding"], widened(state["params"])["table"]["embedding"])
    jitted = jax.jit(step)
    first, again = (jitted(state, batch_of())[0] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    later = jitted(state | {"step": jnp.int32(1)}, batch_of())[0]
    other = jitted(state | {"rng": state["rng"] + 1}, batch_of())[0]
    for different in (later, other):
        assert np.any(different["params"]["table"]["embedding"] != first["params"]["table"]["embedding"])
    assert first["ema"]["table"]["embedding"].dtype == jnp.float32
