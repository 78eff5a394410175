"""Optimizers: Adafactor, AdamW and OptaxOptimizer against optax; stacked layers, logical axes, registration."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.config_examples import changed, example

from t5x_like.config import (
    AdafactorConfig,
    AdamWConfig,
    OptaxOptimizer,
    OptimizerConfig,
    TrainingConfig,
    config_dataclass,
    register_optax_factory,
    register_optimizer,
)
from t5x_like.config.overrides import apply_overrides
from t5x_like.config.serialization import from_json, to_json
from t5x_like.errors import ConfigError
from t5x_like.training.optimizers.adafactor import split
from t5x_like.training.optimizers.make_optimizer import make_optimizer, state_logical_axes
from t5x_like.training.optimizers.optax_optimizer import with_learning_rate
from t5x_like.utils.type_aliases import PyTree

MATRICES = {
    "mlp": {"kernel": ("embed", "mlp")},
    "table": {"embedding": ("vocab", "embed")},
    "positions": {"embedding": ("positions", "embed")},
    "small": {"kernel": ("mlp", "embed")},
    "bias": {"bias": ("mlp",)},
    "norm": {"scale": ("norm",)},
    "relative_bias": {"embedding": ("relative_buckets", "heads")},
}
SHAPES = {
    "mlp": {"kernel": (128, 192)},
    "table": {"embedding": (320, 128)},
    "positions": {"embedding": (128, 128)},
    "small": {"kernel": (192, 96)},
    "bias": {"bias": (192,)},
    "norm": {"scale": (128,)},
    "relative_bias": {"embedding": (32, 4)},
}


def optimizer(config: OptimizerConfig, axes: PyTree) -> optax.GradientTransformationExtraArgs:
    return make_optimizer(TrainingConfig(num_train_steps=1, global_batch_size=1, optimizer=config), axes)


def is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def random_tree(shapes: PyTree, seed: int, scale: float = 1.0) -> PyTree:
    rng = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, shapes, is_leaf=is_shape)


def trajectory(
    tx: optax.GradientTransformation, params: PyTree, gradients: list[PyTree], **extra: Any
) -> tuple[PyTree, PyTree]:
    @jax.jit
    def step(params: PyTree, state: PyTree, grads: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for grads in gradients:
        params, state = step(params, state, grads)
    return params, state


def assert_close(found: PyTree, expected: PyTree, rtol: float = 2e-6) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7), found, expected)


def gradients_for(shapes: PyTree, steps: int = 4) -> list[PyTree]:
    """Return gradients of sizes from far below to far above the clipping threshold."""
    return [random_tree(shapes, seed + 1, scale=10.0 ** (seed - 2)) for seed in range(steps)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "weight_decay": 0.01},
        {"multiply_by_parameter_scale": False, "clipping_threshold": None, "decay_rate": 0.6},
        {"clipping_threshold": 0.5, "min_dim_size_to_factor": 64},
    ],
)
def test_adafactor_of_unstacked_matrices_is_optax_adafactor(options: dict[str, Any]) -> None:
    config = AdafactorConfig(**options)
    reference = optax.adafactor(
        0.05,
        min_dim_size_to_factor=config.min_dim_size_to_factor,
        decay_rate=config.decay_rate,
        multiply_by_parameter_scale=config.multiply_by_parameter_scale,
        clipping_threshold=config.clipping_threshold,
        momentum=config.momentum,
        weight_decay_rate=config.weight_decay or None,
    )
    params, grads = random_tree(SHAPES, 0, scale=0.3), gradients_for(SHAPES)
    expected, _ = trajectory(reference, params, grads)
    found, _ = trajectory(optimizer(config, MATRICES), params, grads, learning_rate=0.05)
    assert_close(found, expected)


STACKED_AXES = {
    "query": {"kernel": ("layers", "embed", "heads", "head_dim")},
    "out": {"kernel": ("layers", "heads", "head_dim", "embed")},
    "wi": {"kernel": ("layers", "embed", "mlp")},
    "norm": {"scale": ("layers", "norm")},
}
STACKED_SHAPES = {
    "query": {"kernel": (3, 128, 4, 40)},
    "out": {"kernel": (3, 4, 40, 128)},
    "wi": {"kernel": (3, 128, 160)},
    "norm": {"scale": (3, 128)},
}


def layer(tree: PyTree, index: int) -> PyTree:
    return jax.tree.map(lambda x: x[index], tree)


def layer_scales(tree: PyTree) -> PyTree:
    """Return layers of very different sizes, so that a statistic over the stack would be wrong for each of them."""
    return jax.tree.map(lambda x: x * 10.0 ** jnp.arange(3).reshape(3, *(1 for _ in x.shape[1:])), tree)


@pytest.mark.parametrize("config", [AdafactorConfig(), AdafactorConfig(momentum=0.5), AdamWConfig(rms_scaled=True)])
def test_a_stacked_parameter_is_updated_as_each_layer_alone(config: AdafactorConfig | AdamWConfig) -> None:
    params = layer_scales(random_tree(STACKED_SHAPES, 0, scale=0.01))
    grads = [layer_scales(tree) for tree in gradients_for(STACKED_SHAPES)]
    found, _ = trajectory(optimizer(config, STACKED_AXES), params, grads, learning_rate=0.05)
    one_axes = jax.tree.map(lambda axes: axes[1:], STACKED_AXES, is_leaf=is_shape)
    for index in range(3):
        alone = [layer(tree, index) for tree in grads]
        expected, _ = trajectory(optimizer(config, one_axes), layer(params, index), alone, learning_rate=0.05)
        assert_close(layer(found, index), expected)


def test_a_three_dimensional_kernel_is_factored_as_the_matrix_it_is() -> None:
    """Heads and head_dim are joined columns: the update is that of the reshaped matrix."""
    params, grads = random_tree(STACKED_SHAPES, 0), gradients_for(STACKED_SHAPES)
    shapes = {"query": (128, 160), "out": (160, 128)}

    def matrices(tree: PyTree) -> PyTree:
        return {name: tree[name]["kernel"][0].reshape(shape) for name, shape in shapes.items()}

    found, _ = trajectory(optimizer(AdafactorConfig(), STACKED_AXES), params, grads, learning_rate=0.05)
    reference = optax.adafactor(0.05)
    expected, _ = trajectory(reference, matrices(params), [matrices(tree) for tree in grads])
    assert_close(matrices(found), expected)


def test_adafactor_keeps_rows_plus_columns_in_place_of_the_product() -> None:
    _, state = trajectory(
        optimizer(AdafactorConfig(), STACKED_AXES), random_tree(STACKED_SHAPES, 0), [], learning_rate=0.1
    )
    sizes = jax.tree.map(lambda x: x.shape, state["second_moment"])
    assert sizes["query"]["kernel"] == {"v_row": (3, 128), "v_col": (3, 4, 40)}
    assert sizes["out"]["kernel"] == {"v_row": (3, 128), "v_col": (3, 4, 40)}
    assert sizes["wi"]["kernel"] == {"v_row": (3, 128), "v_col": (3, 160)}
    assert sizes["norm"]["scale"] == {"v": (3, 128)}
    state_elements = sum(math.prod(x.shape) for x in jax.tree.leaves(state))
    param_elements = sum(math.prod(s) for s in jax.tree.leaves(STACKED_SHAPES, is_leaf=is_shape))
    assert state_elements < 0.02 * param_elements


def test_adafactor_does_not_factor_what_is_too_small_in_either_direction() -> None:
    axes = {"few_rows": ("layers", "embed", "mlp"), "few_columns": ("embed", "heads", "head_dim")}
    shapes = {"few_rows": (200, 64, 256), "few_columns": (256, 2, 32)}
    state = optimizer(AdafactorConfig(), axes).init(random_tree(shapes, 0))
    assert {name: tuple(moments) for name, moments in state["second_moment"].items()} == dict.fromkeys(axes, ("v",))


def test_axes_that_are_partly_rows_and_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="neither"):
        split(("embed", "colour", "mlp"))


def test_adafactor_of_a_zero_gradient_stays_finite() -> None:
    params = random_tree(SHAPES, 0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    found, _ = trajectory(optimizer(AdafactorConfig(), MATRICES), params, [zeros, zeros], learning_rate=0.1)
    assert_close(found, params, rtol=0)


def test_adamw_is_optax_adamw_and_decays_matrices_only() -> None:
    config = AdamWConfig(weight_decay=0.5)
    decayed = {
        name: {leaf: name not in ("bias", "norm", "relative_bias") for leaf in tree} for name, tree in MATRICES.items()
    }
    reference = optax.adamw(0.05, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=0.5, mask=decayed)
    params, grads = random_tree(SHAPES, 0), gradients_for(SHAPES)
    expected, _ = trajectory(reference, params, grads)
    found, _ = trajectory(optimizer(config, MATRICES), params, grads, learning_rate=0.05)
    assert_close(found, expected)


def test_rms_scaled_adamw_multiplies_the_direction_by_the_parameters_size() -> None:
    """The first Adam step is the sign of the gradient, so the update is lr * max(rms(p), 1e-3) * sign(g)."""
    axes = {"kernel": ("embed", "mlp"), "zero": ("embed", "mlp")}
    params = {"kernel": jnp.full((4, 8), 3.0), "zero": jnp.zeros((4, 8))}
    grads = random_tree({"kernel": (4, 8), "zero": (4, 8)}, 1)
    tx = optimizer(AdamWConfig(rms_scaled=True, weight_decay=0.0, eps=0.0), axes)
    found, _ = trajectory(tx, params, [grads], learning_rate=0.1)
    np.testing.assert_allclose(found["kernel"] - params["kernel"], -0.3 * np.sign(grads["kernel"]), rtol=1e-5)
    np.testing.assert_allclose(found["zero"], -1e-4 * np.sign(grads["zero"]), rtol=1e-5)


@pytest.mark.parametrize("config", [AdafactorConfig(momentum=0.9), AdamWConfig()])
def test_optimizer_state_has_the_logical_axes_of_its_parameters(config: AdafactorConfig | AdamWConfig) -> None:
    params = {"stack": random_tree(STACKED_SHAPES, 0)}
    axes = {"stack": STACKED_AXES}
    state = optimizer(config, axes).init(params)
    found = state_logical_axes(state, params, axes)
    jax.tree.map(lambda x, names: np.testing.assert_equal(len(names), x.ndim), state, found)
    if isinstance(config, AdafactorConfig):
        assert found["momentum"] == axes and found["count"] == ()
        moments = found["second_moment"]["stack"]
        assert moments["query"]["kernel"] == {"v_row": ("layers", "embed"), "v_col": ("layers", "heads", "head_dim")}
        assert moments["out"]["kernel"] == moments["query"]["kernel"]
        assert moments["norm"]["scale"] == {"v": ("layers", "norm")}
    else:
        assert found.mu == axes and found.nu == axes and found.count == ()


def test_large_state_that_belongs_to_no_parameter_is_refused() -> None:
    params, axes = {"kernel": jnp.zeros(3)}, {"kernel": ("embed",)}
    state = {"ema": jax.ShapeDtypeStruct((2048, 1024), jnp.float32)}
    with pytest.raises(ConfigError, match="belongs to no parameter"):
        state_logical_axes(state, params, axes)


def test_small_state_that_belongs_to_no_parameter_is_not_sharded() -> None:
    found = state_logical_axes({"history": jnp.zeros((3, 2))}, {"kernel": jnp.zeros(3)}, {"kernel": ("embed",)})
    assert found == {"history": (None, None)}


@pytest.mark.parametrize(
    ("factory", "kwargs", "expected"),
    [
        ("lion", {"b1": 0.8, "weight_decay": 0.0}, optax.lion(0.05, b1=0.8, weight_decay=0.0)),
        ("adamw", {"weight_decay": 0.5}, None),
        ("lamb", {}, optax.lamb(0.05)),
        ("sgd", {"momentum": 0.9, "nesterov": True}, optax.sgd(0.05, momentum=0.9, nesterov=True)),
        ("adafactor", {"momentum": 0.9}, optax.adafactor(0.05, momentum=0.9)),
        ("contrib.muon", {}, optax.contrib.muon(0.05)),
    ],
)
def test_optax_optimizer_is_the_factory_of_optax(factory: str, kwargs: dict[str, Any], expected: Any) -> None:
    config = OptaxOptimizer(factory=factory, kwargs=kwargs)
    if expected is None:
        mask = {
            name: {leaf: name in ("mlp", "table", "positions", "small") for leaf in t} for name, t in MATRICES.items()
        }
        expected = optax.adamw(0.05, mask=mask, **kwargs)
    params, grads = random_tree(SHAPES, 0, scale=0.3), gradients_for(SHAPES)
    tx = optimizer(config, MATRICES)
    result, state = trajectory(tx, params, grads, learning_rate=0.05)
    assert_close(result, trajectory(expected, params, grads)[0])
    axes = state_logical_axes(state, params, MATRICES)
    jax.tree.map(lambda x, names: np.testing.assert_equal(len(names), x.ndim), state, axes)
    # Moments of the table are sharded like the table, or, factored, like its rows and columns.
    assert "'vocab'" in str(axes)


def test_optax_optimizer_follows_the_learning_rate_of_the_step() -> None:
    params = {"kernel": jnp.ones((2, 2))}
    tx = optimizer(OptaxOptimizer(factory="sgd"), {"kernel": ("embed", "mlp")})
    state = tx.init(params)
    for learning_rate in (0.5, 0.25):
        updates, state = jax.jit(tx.update)(params, state, params, learning_rate=learning_rate)
        np.testing.assert_array_equal(updates["kernel"], -learning_rate)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptaxOptimizer(factory="lyon"), "'lyon', no function of optax, expected 'lion', perhaps"),
        (OptaxOptimizer(factory="unheard_of"), "expected one of: .*lion"),
        (OptaxOptimizer(factory="scale_by_lion"), "no optimizer with a learning rate"),
        (
            OptaxOptimizer(factory="lion", kwargs={"beta": 0.9}),
            "kwargs.beta: found an argument that lion does not take",
        ),
        (OptaxOptimizer(factory="polyak_sgd", kwargs={}), "factory: found"),
    ],
)
def test_an_unknown_factory_or_argument_of_optax_is_refused(config: OptaxOptimizer, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        optimizer(config, MATRICES)


def test_a_registered_optimizer_class_is_read_from_json_and_built() -> None:
    @register_optimizer
    @config_dataclass
    class SignDescent(OptimizerConfig):
        kind: Literal["sign_descent"] = "sign_descent"
        scale: float = 1.0

        def build(self, logical_axes: PyTree) -> optax.GradientTransformationExtraArgs:
            del logical_axes
            return with_learning_rate(lambda rate: optax.chain(optax.scale_by_sign(), optax.scale(-self.scale * rate)))

    run = changed(example(), "training.optimizer", SignDescent(scale=0.5))
    assert from_json(to_json(run), source="run") == run
    assert apply_overrides(run, ["--training.optimizer.scale", "2"]).training.optimizer == SignDescent(scale=2.0)
    params = {"kernel": jnp.ones((2, 2))}
    tx = optimizer(SignDescent(scale=0.5), {"kernel": ("embed", "mlp")})
    updates, _ = tx.update(params, tx.init(params), params, learning_rate=jnp.float32(0.1))
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)


def test_a_registered_function_is_a_factory_of_optax_optimizer() -> None:
    @register_optax_factory("halved_sgd")
    def halved_sgd(learning_rate: Any, *, divisor: float = 2.0) -> optax.GradientTransformation:
        return optax.chain(optax.scale(1 / divisor), optax.scale_by_learning_rate(learning_rate))

    params = {"kernel": jnp.ones((2, 2))}
    tx = optimizer(OptaxOptimizer(factory="halved_sgd", kwargs={"divisor": 4.0}), {"kernel": ("embed", "mlp")})
    updates, _ = tx.update(params, tx.init(params), params, learning_rate=1.0)
    np.testing.assert_array_equal(updates["kernel"], -0.25)


def test_an_incomplete_optimizer_is_refused_at_its_registration() -> None:
    with pytest.raises(ConfigError, match="no method build"):

        @register_optimizer
        @config_dataclass
        class Incomplete(OptimizerConfig):
            kind: Literal["incomplete"] = "incomplete"

    with pytest.raises(ConfigError, match="already registered by .*AdamWConfig"):

        @register_optimizer
        @config_dataclass
        class Taken(OptimizerConfig):
            kind: Literal["adamw"] = "adamw"

            def build(self, logical_axes: PyTree) -> Any:
                return logical_axes
