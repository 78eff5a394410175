"""Muon, LAMB, schedule-free AdamW and learning rates of groups, against optax; stacked layers count separately."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from t5x_like.config import (
    AdamWConfig,
    LambConfig,
    LearningRateGroup,
    MuonConfig,
    OptaxOptimizer,
    OptimizerConfig,
    ScheduleFreeConfig,
    TrainingConfig,
)
from t5x_like.errors import ConfigError
from t5x_like.training.optimizers.make_optimizer import make_optimizer, state_logical_axes
from t5x_like.training.optimizers.schedule_free import gradient_point
from t5x_like.utils.type_aliases import PyTree

RATE = 0.05
AXES = {
    "query": {"kernel": ("layers", "embed", "heads", "head_dim")},
    "out": {"kernel": ("layers", "heads", "head_dim", "embed")},
    "experts": {"kernel": ("layers", "experts", "embed", "mlp")},
    "norm": {"scale": ("layers", "norm")},
    "table": {"embedding": ("vocab", "embed")},
    "head": {"kernel": ("embed", "vocab")},
}
SHAPES = {
    "query": {"kernel": (2, 12, 2, 4)},
    "out": {"kernel": (2, 2, 4, 12)},
    "experts": {"kernel": (2, 3, 12, 20)},
    "norm": {"scale": (2, 12)},
    "table": {"embedding": (30, 12)},
    "head": {"kernel": (12, 30)},
}
MATRICES = {"query": (12, 8), "out": (8, 12), "experts": (12, 20)}


def is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def random_tree(seed: int, scale: float = 1.0) -> PyTree:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32), SHAPES, is_leaf=is_shape
    )


def optimizer(config: OptimizerConfig, **training: Any) -> Any:
    return make_optimizer(TrainingConfig(num_train_steps=1, global_batch_size=1, optimizer=config, **training), AXES)


def trajectory(tx: Any, params: PyTree, steps: int = 3, **extra: Any) -> tuple[PyTree, PyTree]:
    state = tx.init(params)
    update = jax.jit(lambda grads, state, params: tx.update(grads, state, params, **extra))
    for step in range(steps):
        updates, state = update(random_tree(step + 1, 10.0**-step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def single_matrices(tree: PyTree) -> PyTree:
    """Return each layer's and expert's kernel as a parameter of its own, beside the other parameters."""
    flat = {name: tree[name]["kernel"].reshape(-1, *shape) for name, shape in MATRICES.items()}
    matrices = {f"{name}_{i}": x for name, stack in flat.items() for i, x in enumerate(stack)}
    return {"matrices": matrices, "others": {name: tree[name] for name in ("norm", "table", "head")}}


def reference_trajectory(tx: Any, params: PyTree, steps: int = 3) -> PyTree:
    params = single_matrices(params)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(single_matrices(random_tree(step + 1, 10.0**-step)), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_close(found: PyTree, expected: PyTree, rtol: float = 1e-5) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), found, expected)


@pytest.mark.parametrize("update_rms", [0.2, None])
def test_muon_of_a_stack_is_optax_muon_of_each_matrix(update_rms: float | None) -> None:
    params = random_tree(0)
    config = MuonConfig(update_rms=update_rms, weight_decay=0.0)
    found, state = trajectory(optimizer(config), params, learning_rate=RATE)
    numbers = jax.tree.map(
        lambda x: optax.contrib.MuonDimensionNumbers() if x.shape in MATRICES.values() else None,
        single_matrices(params),
    )
    reference = optax.contrib.muon(
        RATE,
        adam_b1=config.b1,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=numbers,
        consistent_rms=update_rms,
    )
    # optax gives Adam Nesterov's momentum as well; this package's Adam has none.
    expected, _ = reference_trajectory(reference, params)
    assert_close(single_matrices(found)["matrices"], expected["matrices"])
    adam, _ = reference_trajectory(optax.adam(RATE, b1=config.b1, b2=config.b2), params)
    assert_close(single_matrices(found)["others"], adam["others"])
    axes = state_logical_axes(state, params, AXES)
    assert "('layers', 'embed', 'heads', 'head_dim')" in str(axes) and "('vocab', 'embed')" in str(axes)
    assert sum(x.size for x in jax.tree.leaves(state)) < 2 * sum(x.size for x in jax.tree.leaves(params))


def test_muon_steps_have_equal_singular_values_and_decay() -> None:
    params = random_tree(0)
    found, _ = trajectory(optimizer(MuonConfig(weight_decay=0.5)), params, steps=1, learning_rate=RATE)
    step = (params["experts"]["kernel"] * (1 - RATE * 0.5) - found["experts"]["kernel"]) / (RATE * 0.2 * 20**0.5)
    values = np.linalg.svd(step, compute_uv=False)
    assert values.shape == (2, 3, 12) and values.min() > 0.6 and values.max() < 1.3


def test_lamb_of_a_stack_is_optax_lamb_of_each_matrix() -> None:
    params = random_tree(0)
    config = LambConfig(weight_decay=0.3)
    found, _ = trajectory(optimizer(config), params, learning_rate=RATE)
    masked = single_matrices(jax.tree.map(lambda x: x, params))
    mask = jax.tree_util.tree_map_with_path(lambda path, x: "norm" not in str(path), masked)
    reference = optax.lamb(RATE, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=0.3, mask=mask)
    expected, _ = reference_trajectory(reference, params)
    found = single_matrices(found)
    # Norms of a stack are one array in the reference, whose norm is that of both layers.
    del found["others"]["norm"], expected["others"]["norm"]
    assert_close(found, expected)


def test_schedule_free_parameters_are_the_average_of_optax_schedule_free() -> None:
    params = random_tree(0)
    config = ScheduleFreeConfig(b1=0.8, weight_decay=0.0)
    tx = optimizer(config)
    found, state = trajectory(tx, params, learning_rate=RATE)
    reference = optax.contrib.schedule_free_adamw(RATE, b1=config.b1, b2=config.b2, eps=config.eps)
    y, reference_state = reference_trajectory(reference, params)
    assert_close(single_matrices(found), optax.contrib.schedule_free_eval_params(reference_state, y), rtol=1e-4)
    assert_close(single_matrices(gradient_point(tx, found, state)), y, rtol=1e-4)
    axes = state_logical_axes(state, params, AXES)
    assert axes["z"] == AXES and axes["rms"].nu == AXES


def test_schedule_free_decay_and_a_warm_up_follow_the_paper() -> None:
    params, config = random_tree(0), ScheduleFreeConfig(b1=0.9, weight_decay=0.2, b2=0.9)
    tx = optimizer(config)
    state, x = tx.init(params), params
    z, v, total = np.asarray(params["head"]["kernel"]), 0.0, 0.0
    mean = z
    for step, rate in enumerate((0.01, 0.03, 0.02)):
        grads = random_tree(step + 1)
        updates, state = jax.jit(tx.update)(grads, state, x, learning_rate=jnp.float32(rate))
        x = optax.apply_updates(x, updates)
        g, y = np.asarray(grads["head"]["kernel"]), 0.1 * z + 0.9 * mean
        v = 0.9 * v + 0.1 * g**2
        z = z - rate * (g / (np.sqrt(v / (1 - 0.9 ** (step + 1))) + config.eps) + 0.2 * y)
        largest = max(0.01, 0.03 if step else 0.0)
        total += largest**2
        mean = mean + largest**2 / total * (z - mean)
    np.testing.assert_allclose(x["head"]["kernel"], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [AdamWConfig(), MuonConfig(), ScheduleFreeConfig()])
def test_a_group_trains_as_in_a_run_with_its_learning_rate(config: OptimizerConfig) -> None:
    params = random_tree(0)
    groups = (LearningRateGroup(paths=("table/.*", "head/kernel"), factor=0.25),)
    tx = optimizer(config, learning_rate_groups=groups)
    found, state = trajectory(tx, params, learning_rate=RATE, step=0)
    assert set(state) == {"from_step_0", "from_step_0_rate_0.25"}
    for factor in (1.0, 0.25):
        expected, _ = trajectory(optimizer(config), params, learning_rate=RATE * factor)
        names = ("table", "head") if factor == 0.25 else ("query", "out", "experts", "norm")
        for name in names:
            assert_close(found[name], expected[name], rtol=1e-4)
    assert jax.tree.structure(gradient_point(tx, found, state)) == jax.tree.structure(params)


@pytest.mark.parametrize("config", [AdamWConfig(), LambConfig(), MuonConfig()])
def test_each_layer_trains_as_in_a_run_with_its_learning_rate(config: OptimizerConfig) -> None:
    params = random_tree(0)
    found, _ = trajectory(optimizer(config, layer_decay=0.5), params, learning_rate=RATE)
    for layer, factor in enumerate((0.25, 0.5)):
        expected, _ = trajectory(optimizer(config), params, learning_rate=RATE * factor)
        for name, leaf in (("query", "kernel"), ("out", "kernel"), ("experts", "kernel"), ("norm", "scale")):
            assert_close(found[name][leaf][layer], expected[name][leaf][layer], rtol=1e-4)
    expected, _ = trajectory(optimizer(config), params, learning_rate=RATE)
    assert_close(found["head"], expected["head"])


def test_embeddings_are_below_the_lowest_layer() -> None:
    axes = {
        "encoder": {"layers": {"norm": {"scale": ("layers", "norm")}}, "final_norm": {"scale": ("norm",)}},
        "token_embedder": {"embedding": ("vocab", "embed")},
        "unscaled_embedding": ("embed",),
    }
    params = {
        "encoder": {"layers": {"norm": {"scale": jnp.ones((3, 4))}}, "final_norm": {"scale": jnp.ones(4)}},
        "token_embedder": {"embedding": jnp.ones((5, 4))},
        "unscaled_embedding": jnp.ones(4),
    }
    training = TrainingConfig(num_train_steps=1, global_batch_size=1, optimizer=AdamWConfig())

    def updates(config: TrainingConfig) -> PyTree:
        tx = make_optimizer(config, axes)
        return tx.update(params, tx.init(params), params, learning_rate=jnp.float32(RATE))[0]

    found, plain = updates(dataclasses.replace(training, layer_decay=0.5)), updates(training)
    ratios = jax.tree.map(lambda one, other: np.unique(np.round(one / other, 4)).tolist(), found, plain)
    assert ratios["token_embedder"] == {"embedding": [0.0625]}
    assert ratios["unscaled_embedding"] == [0.0625]
    assert ratios["encoder"] == {"layers": {"norm": {"scale": [0.125, 0.25, 0.5]}}, "final_norm": {"scale": [1.0]}}
    schedule_free = dataclasses.replace(training, optimizer=ScheduleFreeConfig(), layer_decay=0.5)
    with pytest.raises(ConfigError, match="averages iterates"):
        updates(schedule_free)


def test_a_group_that_matches_no_parameter_is_refused() -> None:
    groups = (LearningRateGroup(paths=("tabel/.*",), factor=0.5),)
    with pytest.raises(ConfigError, match=r"learning_rate_groups.0.paths.0: found 'tabel/\.\*', which matches no"):
        optimizer(AdamWConfig(), learning_rate_groups=groups)


@pytest.mark.parametrize(("factory", "expected"), [("contrib.muon", "kind 'muon'"), ("lars", "each element")])
def test_functions_of_optax_that_mix_layers_are_refused(factory: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"does not treat the layers .*{expected}"):
        optimizer(OptaxOptimizer(factory=factory))
