"""Adafactor and AdamW against optax, and what stacked layers and logical axes add."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_like.config import Adafactor, AdamW, TrainingConfig
from t5x_like.training.adafactor import split
from t5x_like.training.optimizers import make_optimizer, state_logical_axes

Tree = Any

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


def optimizer(config: Adafactor | AdamW, axes: Tree) -> optax.GradientTransformationExtraArgs:
    return make_optimizer(TrainingConfig(num_train_steps=1, batch_size=1, optimizer=config), axes)


def is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def random_tree(shapes: Tree, seed: int, scale: float = 1.0) -> Tree:
    rng = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, shapes, is_leaf=is_shape)


def trajectory(
    tx: optax.GradientTransformation, params: Tree, gradients: list[Tree], **extra: Any
) -> tuple[Tree, Tree]:
    @jax.jit
    def step(params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for grads in gradients:
        params, state = step(params, state, grads)
    return params, state


def assert_close(found: Tree, expected: Tree, rtol: float = 2e-6) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7), found, expected)


def gradients_for(shapes: Tree, steps: int = 4) -> list[Tree]:
    """Sizes from far below to far above the clipping threshold."""
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
    config = Adafactor(**options)
    theirs = optax.adafactor(
        0.05,
        min_dim_size_to_factor=config.min_dim_size_to_factor,
        decay_rate=config.decay_rate,
        multiply_by_parameter_scale=config.multiply_by_parameter_scale,
        clipping_threshold=config.clipping_threshold,
        momentum=config.momentum,
        weight_decay_rate=config.weight_decay or None,
    )
    params, grads = random_tree(SHAPES, 0, scale=0.3), gradients_for(SHAPES)
    expected, _ = trajectory(theirs, params, grads)
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


def layer(tree: Tree, index: int) -> Tree:
    return jax.tree.map(lambda x: x[index], tree)


def layer_scales(tree: Tree) -> Tree:
    """Layers of very different sizes, so that a statistic over the stack would be wrong for each of them."""
    return jax.tree.map(lambda x: x * 10.0 ** jnp.arange(3).reshape(3, *(1 for _ in x.shape[1:])), tree)


@pytest.mark.parametrize("config", [Adafactor(), Adafactor(momentum=0.5), AdamW(rms_scaled=True)])
def test_a_stacked_parameter_is_updated_as_each_layer_alone(config: Adafactor | AdamW) -> None:
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

    def matrices(tree: Tree) -> Tree:
        return {name: tree[name]["kernel"][0].reshape(shape) for name, shape in shapes.items()}

    found, _ = trajectory(optimizer(Adafactor(), STACKED_AXES), params, grads, learning_rate=0.05)
    theirs = optax.adafactor(0.05)
    expected, _ = trajectory(theirs, matrices(params), [matrices(tree) for tree in grads])
    assert_close(matrices(found), expected)


def test_adafactor_keeps_rows_plus_columns_in_place_of_the_product() -> None:
    _, state = trajectory(optimizer(Adafactor(), STACKED_AXES), random_tree(STACKED_SHAPES, 0), [], learning_rate=0.1)
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
    state = optimizer(Adafactor(), axes).init(random_tree(shapes, 0))
    assert {name: tuple(moments) for name, moments in state["second_moment"].items()} == dict.fromkeys(axes, ("v",))


def test_axes_that_are_partly_rows_and_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="neither"):
        split(("embed", "colour", "mlp"))


def test_adafactor_of_a_zero_gradient_stays_finite() -> None:
    params = random_tree(SHAPES, 0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    found, _ = trajectory(optimizer(Adafactor(), MATRICES), params, [zeros, zeros], learning_rate=0.1)
    assert_close(found, params, rtol=0)


def test_adamw_is_optax_adamw_and_decays_matrices_only() -> None:
    config = AdamW(weight_decay=0.5)
    decayed = {
        name: {leaf: name not in ("bias", "norm", "relative_bias") for leaf in tree} for name, tree in MATRICES.items()
    }
    theirs = optax.adamw(0.05, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=0.5, mask=decayed)
    params, grads = random_tree(SHAPES, 0), gradients_for(SHAPES)
    expected, _ = trajectory(theirs, params, grads)
    found, _ = trajectory(optimizer(config, MATRICES), params, grads, learning_rate=0.05)
    assert_close(found, expected)


def test_rms_scaled_adamw_multiplies_the_direction_by_the_parameters_size() -> None:
    """The first Adam step is the sign of the gradient, so the update is lr * max(rms(p), 1e-3) * sign(g)."""
    axes = {"kernel": ("embed", "mlp"), "zero": ("embed", "mlp")}
    params = {"kernel": jnp.full((4, 8), 3.0), "zero": jnp.zeros((4, 8))}
    grads = random_tree({"kernel": (4, 8), "zero": (4, 8)}, 1)
    tx = optimizer(AdamW(rms_scaled=True, weight_decay=0.0, eps=0.0), axes)
    found, _ = trajectory(tx, params, [grads], learning_rate=0.1)
    np.testing.assert_allclose(found["kernel"] - params["kernel"], -0.3 * np.sign(grads["kernel"]), rtol=1e-5)
    np.testing.assert_allclose(found["zero"], -1e-4 * np.sign(grads["zero"]), rtol=1e-5)


@pytest.mark.parametrize("config", [Adafactor(momentum=0.9), AdamW()])
def test_optimizer_state_has_the_logical_axes_of_its_parameters(config: Adafactor | AdamW) -> None:
    params = {"stack": random_tree(STACKED_SHAPES, 0)}
    axes = {"stack": STACKED_AXES}
    state = optimizer(config, axes).init(params)
    found = state_logical_axes(state, params, axes)
    jax.tree.map(lambda x, names: np.testing.assert_equal(len(names), x.ndim), state, found)
    if isinstance(config, Adafactor):
        assert found["momentum"] == axes and found["count"] == ()
        moments = found["second_moment"]["stack"]
        assert moments["query"]["kernel"] == {"v_row": ("layers", "embed"), "v_col": ("layers", "heads", "head_dim")}
        assert moments["out"]["kernel"] == moments["query"]["kernel"]
        assert moments["norm"]["scale"] == {"v": ("layers", "norm")}
    else:
        assert found.mu == axes and found.nu == axes and found.count == ()


def test_state_that_belongs_to_no_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match="belongs to no parameter"):
        state_logical_axes({"ema": jnp.zeros(3)}, {"kernel": jnp.zeros(3)}, {"kernel": ("embed",)})
