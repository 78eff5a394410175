"""Adafactor (Shazeer and Stern 2018) with the semantics of T5X's `adafactor.py`.

What T5X adds to the paper: which dimensions are rows and which are columns is said by the parameter's logical axes, so
that a kernel [embed, heads, head_dim] is factored as the matrix [embed, heads * head_dim] that it is; and the stacked
axis of scanned layers is a batch axis, so that moments, scales and clipping are those of each layer on its own.

One difference: T5X applies `min_dim_size_to_factor` to unstacked matrices only. Here it holds for every parameter, and
joined dimensions count as their product, so that stacking the layers of a model does not change what is factored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5x_like.config import Adafactor
from t5x_like.partitioning.rules import LogicalAxes
from t5x_like.training.slices import averaged_dims, rms

Tree = Any

ROWS = frozenset({"embed"})
COLUMNS = frozenset({"vocab", "mlp", "heads", "kv_heads", "head_dim"})


def split(axes: LogicalAxes) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(row dimensions, column dimensions) of a parameter seen as a matrix; None if it is not one.

    Names decide (`ROWS`, `COLUMNS`). Two dimensions that the names do not tell apart, as in [positions, embed], are a
    row and a column in their order.

    Raises:
      ValueError: a parameter with rows, columns, and something that is neither.
    """
    dims = averaged_dims(axes)
    rows = tuple(dim for dim in dims if axes[dim] in ROWS)
    columns = tuple(dim for dim in dims if axes[dim] in COLUMNS)
    if rows and columns:
        if len(rows) + len(columns) < len(dims):
            raise ValueError(f"Adafactor: axes {axes} have rows, columns, and others that are neither")
        return rows, columns
    return (dims[:1], dims[1:]) if len(dims) == 2 else None


def without(items: Sequence[Any], dims: Sequence[int]) -> tuple[Any, ...]:
    """`items` without those at `dims`."""
    return tuple(item for dim, item in enumerate(items) if dim not in dims)


def moment_axes(kind: str, axes: LogicalAxes) -> LogicalAxes:
    """Logical axes of a second moment: `v` has the parameter's, `v_row` lacks the columns, `v_col` the rows."""
    factors = split(axes)
    if kind == "v" or factors is None:
        return axes
    rows, columns = factors
    return without(axes, columns if kind == "v_row" else rows)


@dataclasses.dataclass(frozen=True)
class _Result:
    """What one parameter's update gives. Not a pytree, so that a tree of these can be taken apart."""

    update: jax.Array
    second_moment: dict[str, jax.Array]
    momentum: jax.Array | None


def adafactor(config: Adafactor, logical_axes: Tree) -> optax.GradientTransformationExtraArgs:
    """The optimizer for parameters with these logical axes; `update` takes the learning rate as a keyword.

    With g the gradient, p a layer's slice of a parameter, lr the learning rate and t = 1, 2, ...:
      beta2 = 1 - t**-decay_rate; v = beta2 v + (1 - beta2) (g**2 + epsilon1), kept as its means over columns (v_row)
      and over rows (v_col) where both have min_dim_size_to_factor elements, and then read as
      v_row v_col / mean(v_row);
      u = g / sqrt(v); u /= max(1, rms(u) / clipping_threshold);
      step = lr max(rms(p), epsilon2) u, averaged over time if there is a momentum;
      p -= step + weight_decay p. As in T5X, the decay is not multiplied by the learning rate.

    The state is {"count", "second_moment", "momentum" if any}; in the place of each parameter, `second_moment` has
    {"v_row", "v_col"} or {"v"}, float32.
    """

    def factors(param: jax.Array, axes: LogicalAxes) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        found = split(axes)
        if found is None:
            return None
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

    def init(params: Tree) -> Tree:
        state = {
            "count": jnp.zeros((), jnp.int32),
            "second_moment": jax.tree.map(zeros, params, logical_axes),
        }
        if config.momentum is not None:
            state["momentum"] = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        return state

    def update(grads: Tree, state: Tree, params: Tree | None = None, *, learning_rate: jax.Array) -> tuple[Tree, Tree]:
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)
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
                wide_row = jnp.expand_dims(v_row, columns)
                row_factor = jax.lax.rsqrt(wide_row / jnp.mean(wide_row, axis=rows, keepdims=True))
                direction = grad * row_factor * jnp.expand_dims(jax.lax.rsqrt(v_col), rows)
            size = learning_rate
            if config.clipping_threshold is not None:
                size = size / jnp.maximum(1.0, rms(direction, axes) / config.clipping_threshold)
            if config.multiply_by_parameter_scale:
                size = size * jnp.maximum(rms(param, axes), config.epsilon2)
            step = size * direction
            if momentum is not None and config.momentum is not None:
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
