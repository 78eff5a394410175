"""Replay of a step: results that differ in a bit, and copies that do, are found with the device that has them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_like.errors import SafetyError
from t5x_like.trainer.replay_check import ReplayCheck

SPECS = {"whole": PartitionSpec(), "by rows": PartitionSpec("data"), "by columns": PartitionSpec(None, "tensor")}


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "tensor"))


def make_state(mesh: Mesh) -> dict[str, jax.Array]:
    values = jax.random.normal(jax.random.key(0), (8, 4))
    return {name: jax.device_put(values, NamedSharding(mesh, spec)) for name, spec in SPECS.items()}


@jax.jit
def sound_step(state: Any, batch: Any) -> tuple[Any, Any]:
    return jax.tree.map(lambda x: x * batch, state), {"loss": batch}


def with_flipped_bit(x: jax.Array, device: int) -> jax.Array:
    """Return the array with a changed element in the memory of one device."""
    parts = []
    for shard in x.addressable_shards:
        part = np.array(shard.data)
        if shard.device.id == device:
            part.flat[1] = np.nextafter(part.flat[1], np.inf)
        parts.append(jax.device_put(part, shard.device))
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)


def test_sound_step_is_taken_once(mesh: Mesh) -> None:
    check = ReplayCheck(3, sound_step, mesh)
    assert [step for step in range(1, 10) if check.is_due(step)] == [3, 6, 9]
    state, metrics = check.run(3, make_state(mesh), jnp.float32(2))
    assert metrics["loss"] == 2
    for name, value in make_state(mesh).items():
        assert (np.asarray(state[name]) == 2 * np.asarray(value)).all()


@pytest.mark.parametrize("name", SPECS)
def test_device_that_computes_otherwise_once_is_named(mesh: Mesh, name: str) -> None:
    calls = []

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        state, metrics = sound_step(state, batch)
        calls.append(1)
        return {**state, name: with_flipped_bit(state[name], 5)} if len(calls) == 1 else state, metrics

    with pytest.raises(SafetyError, match=f"step 7 .*\n  - {name} differs from .* on device 5 of process 0\n"):
        ReplayCheck(1, step, mesh).run(7, make_state(mesh), jnp.float32(2))


@pytest.mark.parametrize("name", SPECS)
def test_device_whose_copy_differs_is_named(mesh: Mesh, name: str) -> None:
    """A wrong copy in memory gives the same wrong result each time."""
    state = make_state(mesh)
    state[name] = with_flipped_bit(state[name], 6)
    found = r"6|7" if name == "by rows" else "6"  # Of two copies, either may be the wrong one.
    with pytest.raises(SafetyError, match=f"{name} has another value than its copies on device ({found}) of process 0"):
        ReplayCheck(1, sound_step, mesh).run(1, state, jnp.float32(2))
