"""Adafactor (Shazeer and Stern 2018) with the semantics of T5X's `adafactor.py`.

T5X adds two things to the paper. The logical axes of a parameter decide which dimensions are rows and which are
columns, so that a kernel [embed, heads, head_dim] is factored as the matrix [embed, heads * head_dim]. And the stacked
axis of scanned layers is a batch axis, so that each layer has its own moments, scale and clipping.

There is one difference: T5X applies `min_dim_size_to_factor` to unstacked matrices only. Here it applies to every
parameter, and joined dimensions count as their product, so that stacking the layers of a model does not change which
parameters are factored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5x_like.config import AdafactorConfig
from t5x_like.sharding.rules import LogicalAxes
from t5x_like.training.optimizers.per_layer import averaged_dims, rms
from t5x_like.utils.type_aliases import PyTree

ROWS = frozenset({"embed"})
COLUMNS = frozenset({"vocab", "mlp", "heads", "kv_heads", "head_dim"})


def split(axes: LogicalAxes) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return (row dimensions, column dimensions) of a parameter as a matrix; None if it is not a matrix.

    The axis names decide (`ROWS`, `COLUMNS`). Two dimensions that the names do not distinguish, as in
    [positions, embed], are a row and a column in their order.

    Raises:
      ValueError: a parameter with rows, columns, and other dimensions.
    """
    dims = averaged_dims(axes)
    rows = tuple(dim for dim in dims if axes[dim] in ROWS)
    columns = tuple(dim for dim in dims if axes[dim] in COLUMNS)
    if rows and columns:
        if len(rows) + len(columns) < len(dims):
            raise ValueError(f"adafactor: axes {axes} have rows, columns, and others that are neither")
        return rows, columns
    return (dims[:1], dims[1:]) if len(dims) == 2 else None


def without(items: Sequence[Any], dims: Sequence[int]) -> tuple[Any, ...]:
    """Return `items` without those at the indices `dims`."""
    return tuple(item for dim, item in enumerate(items) if dim not in dims)


def moment_axes(kind: str, axes: LogicalAxes) -> LogicalAxes:
    """Return the axes of a second moment: `v` has the parameter's axes, `v_row` lacks the columns, `v_col` the rows."""
    factors = split(axes)
    if kind == "v" or factors is None:
        return axes
    rows, columns = factors
    return without(axes, columns if kind == "v_row" else rows)


@dataclasses.dataclass(frozen=True)
class _Result:
    """Result of one parameter's update. It is not a pytree, so that a tree of results can be taken apart."""

    update: jax.Array
    second_moment: dict[str, jax.Array]
    momentum: jax.Array | None


def adafactor(config: AdafactorConfig, logical_axes: PyTree) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer for parameters with these logical axes; `update` takes the learning rate as a keyword.

    With g the gradient, p a layer's slice of a parameter, lr the learning rate and t = 1, 2, ...:
      beta2 = 1 - t**-decay_rate; v = beta2 v + (1 - beta2) (g**2 + epsilon1). If rows and columns both have
      min_dim_size_to_factor elements, v is stored as its means over columns (v_row) and over rows (v_col), and read as
      v_row v_col / mean(v_row);
      u = g / sqrt(v); u /= max(1, rms(u) / clipping_threshold);
      step = lr max(rms(p), epsilon2) u, averaged over time if there is a momentum;
      p -= step + weight_decay p. As in T5X, the decay is not multiplied by the learning rate.

    The state is {"count", "second_moment", "momentum" if there is one}. `second_moment` is a tree like the parameters
    with {"v_row", "v_col"} or {"v"}, float32, in place of each array.
    """

    def factors(param: jax.Array, axes: LogicalAxes) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        found = split(axes)
        if found is None:
            return None
        # Factored moments of a narrow matrix save little memory and are a poor estimate.
        smallest = min(math.prod(param.shape[dim] for dim in dims) for dims in found)
        return found if smallest >= config.min_dim_size_to_factor else None

    def zeros(param: jax.Array, axes: LogicalAxes) -> dict[str, jax.Array]:
        found = factors(param, axes)
        if found is None:
            return {"v": jnp.zeros(param.shape, jnp.float32)}
        rows, columns = found
        return {
            "v_row": jnp.zeros(without(param.shape, columns), jnp.float32),
            "v_col": jnp.zeros(without(param.shape, rows), jnp.float32),
        }

    def init(params: PyTree) -> PyTree:
        state = {
            "count": jnp.zeros((), jnp.int32),
            "second_moment": jax.tree.map(zeros, params, logical_axes),
        }
        if config.momentum is not None:
            state["momentum"] = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        return state

    def update(
        grads: PyTree, state: PyTree, params: PyTree | None = None, *, learning_rate: jax.Array
    ) -> tuple[PyTree, PyTree]:
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)
        # At t = 1 the decay is 1 - 1**-r = 0: the first moments equal those of the first gradient, without a bias
        # correction.
        count = state["count"] + 1
        beta2 = 1.0 - count.astype(jnp.float32) ** -config.decay_rate

        def one(
            grad: jax.Array,
            param: jax.Array,
            axes: LogicalAxes,
            old: dict[str, jax.Array],
            momentum: jax.Array | None = None,
        ) -> _Result:
            grad = grad.astype(jnp.float32)
            # epsilon1 (1e-30) is added to the square and not to the root: it only avoids a division by zero where a
            # gradient is 0.
            square = jnp.square(grad) + config.epsilon1
            found = factors(param, axes)
            if found is None:
                moments = {"v": beta2 * old["v"] + (1.0 - beta2) * square}
                direction = grad * jax.lax.rsqrt(moments["v"])
            else:
                rows, columns = found
                v_row = beta2 * old["v_row"] + (1.0 - beta2) * jnp.mean(square, axis=columns)
                v_col = beta2 * old["v_col"] + (1.0 - beta2) * jnp.mean(square, axis=rows)
                moments = {"v_row": v_row, "v_col": v_col}
                # v_row v_col / mean(v_row) is the matrix of rank 1 that has these row and column means (Shazeer and
                # Stern 2018, section 3). The roots are taken of each factor: their product could underflow float32.
                wide_row = jnp.expand_dims(v_row, columns)
                row_factor = jax.lax.rsqrt(wide_row / jnp.mean(wide_row, axis=rows, keepdims=True))
                direction = grad * row_factor * jnp.expand_dims(jax.lax.rsqrt(v_col), rows)
            size = learning_rate
            if config.clipping_threshold is not None:
                # Clipping acts on the normalized update, whose RMS is about 1. It limits the first steps after a
                # period of small gradients, when the second moments are too small.
                size = size / jnp.maximum(1.0, rms(direction, axes) / config.clipping_threshold)
            if config.multiply_by_parameter_scale:
                # Relative step sizes: a parameter changes by a fraction of its own scale. epsilon2 lets parameters that
                # begin at zero move.
                size = size * jnp.maximum(rms(param, axes), config.epsilon2)
            step = size * direction
            if momentum is not None and config.momentum is not None:
                # The momentum averages finished steps, learning rate included, as in T5X; there is no bias correction.
                step = momentum = config.momentum * momentum + (1.0 - config.momentum) * step
            if config.weight_decay:
                step = step + config.weight_decay * param
            return _Result(-step.astype(param.dtype), moments, momentum)

        trees = [grads, params, logical_axes, state["second_moment"]]
        if config.momentum is not None:
            trees.append(state["momentum"])
        results = jax.tree.map(one, *trees)
        new_state = {"count": count, "second_moment": jax.tree.map(lambda r: r.second_moment, results)}
        if config.momentum is not None:
            new_state["momentum"] = jax.tree.map(lambda r: r.momentum, results)
        return jax.tree.map(lambda r: r.update, results), new_state

    return optax.GradientTransformationExtraArgs(init, update)
