"""Optimizers on meshes: the steps of one device, state split as the parameters, and bitwise equal continuation."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_like.config import (
    LambConfig,
    MuonConfig,
    OptaxOptimizer,
    OptimizerConfig,
    ScheduleFreeConfig,
    ShardingConfig,
    TrainingConfig,
)
from t5x_like.sharding.constrain import activation_context
from t5x_like.sharding.mesh import make_mesh
from t5x_like.sharding.rules import default_rules
from t5x_like.sharding.shardings import tree_shardings
from t5x_like.training.optimizers.make_optimizer import make_optimizer, state_logical_axes
from t5x_like.utils.type_aliases import PyTree

AXES = {
    "query": {"kernel": ("layers", "embed", "heads", "head_dim")},
    "wo": {"kernel": ("layers", "mlp", "embed")},
    "table": {"embedding": ("vocab", "embed")},
    "norm": {"scale": ("layers", "norm")},
}
SHAPES = {
    "query": {"kernel": (4, 16, 4, 8)},
    "wo": {"kernel": (4, 32, 16)},
    "table": {"embedding": (64, 16)},
    "norm": {"scale": (4, 16)},
}
OPTIMIZERS = {
    "muon": MuonConfig(),
    "lion": OptaxOptimizer(factory="lion"),
    "lamb": LambConfig(),
    "schedule_free": ScheduleFreeConfig(),
}


def random_tree(seed: int) -> PyTree:
    rng = np.random.default_rng(seed)
    shapes = jax.tree.map(np.asarray, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree.map(lambda shape: rng.standard_normal(tuple(shape)).astype(np.float32), shapes)


def steps(config: OptimizerConfig, sharding: ShardingConfig, devices: int) -> tuple[Any, Any, Any]:
    """Return params and state after two steps, params after the second one from a copy on the host, and shardings."""
    rules, mesh = default_rules(sharding), make_mesh(sharding, jax.devices()[:devices])
    optimizer = make_optimizer(TrainingConfig(num_train_steps=2, global_batch_size=8, optimizer=config), AXES)
    params = random_tree(0)
    abstract = jax.eval_shape(optimizer.init, params)
    of_params = tree_shardings(mesh, rules, AXES, params)
    of_state = tree_shardings(mesh, rules, state_logical_axes(abstract, params, AXES), abstract)

    @functools.partial(jax.jit, in_shardings=(of_params, of_state, of_params), out_shardings=(of_params, of_state))
    @activation_context(mesh, rules)
    def step(params: PyTree, state: PyTree, grads: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = optimizer.update(grads, state, params, learning_rate=jnp.float32(0.1))
        return optax.apply_updates(params, updates), state

    first = step(params, jax.jit(optimizer.init, out_shardings=of_state)(params), random_tree(1))
    second = step(*first, random_tree(2))
    resumed = step(*jax.tree.map(np.asarray, first), random_tree(2))
    return second, resumed, (of_params, of_state)


@functools.cache
def one_device(name: str) -> PyTree:
    return steps(OPTIMIZERS[name], ShardingConfig(fsdp=1), 1)[0]


@pytest.mark.parametrize("sharding", [ShardingConfig(fsdp=8), ShardingConfig(data=2, fsdp=2, tensor=2)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_steps_do_not_depend_on_the_mesh(
    name: str, sharding: ShardingConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    found, resumed, (of_params, of_state) = steps(OPTIMIZERS[name], sharding, 8)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, one_device(name))
    jax.tree.map(np.testing.assert_array_equal, resumed, found)
    # Each array of state of the size of a kernel is split as the kernel.
    specs = {x.spec for x in jax.tree.leaves(of_state)}
    assert of_params["query"]["kernel"].spec in specs and of_params["wo"]["kernel"].spec in specs
    split = [x for x in jax.tree.leaves(found[1]) if x.ndim >= 2 and x.shape[-1] > 4 and x.shape != (4, 16)]
    assert split and all(not x.sharding.is_fully_replicated for x in split)
