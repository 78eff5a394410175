"""Norms of parameters, gradients and updates by layer and by module, for a look at where training is unstable."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from t5x_like.monitoring.metrics import WeightedMean
from t5x_like.utils import tree_paths
from t5x_like.utils.type_aliases import PyTree

PREFIXES = ("param_norm/", "gradient_norm/", "update_norm/")
_LAYERS = "layers"


def norm_metrics(
    trees: Callable[[], Mapping[str, PyTree]], is_due: jax.Array, is_finite: jax.Array
) -> dict[str, WeightedMean]:
    """Return the Euclidean norms of the parts of trees that have the structure of the parameters.

    Args:
      trees: Function that returns trees by the prefix of their metrics, one of `PREFIXES`. Arrays of stacked layers
        have these as their first axis. It is traced within a branch that only the steps that are due execute.
      is_due: Scalar boolean; where it is false the weights are 0.
      is_finite: Scalar boolean; the same.

    Returns:
      Metrics named PREFIX/PART. The parts are the modules: for `encoder/layers/mlp/wi/kernel` that is
      `encoder/layers/mlp`, over all layers, and for `head/kernel` it is `head`; and the layers, such as
      `encoder/layers/3`, with all modules that every layer has.
    """

    def compute() -> dict[str, jax.Array]:
        return {name: jnp.sqrt(total) for name, total in _squares(trees()).items()}

    def skip() -> dict[str, jax.Array]:
        return {name: jnp.zeros(x.shape) for name, x in jax.eval_shape(compute).items()}

    counts = is_due & is_finite
    norms = jax.lax.cond(counts, compute, skip)
    return {name: WeightedMean(norm, counts.astype(jnp.float32)) for name, norm in norms.items()}


def is_empty_norm(name: str, mean: WeightedMean) -> bool:
    """Return True for a norm of an interval in which no step was due."""
    return name.startswith(PREFIXES) and not float(mean.weight)


def _squares(trees: Mapping[str, PyTree]) -> dict[str, jax.Array]:
    totals: dict[str, jax.Array] = {}

    def add(name: str, value: jax.Array) -> None:
        totals[name] = totals[name] + value if name in totals else value

    for prefix, tree in trees.items():
        leaves = tree_paths.by_path(tree)
        for path, leaf in leaves.items():
            squares = jnp.square(leaf.astype(jnp.float32))
            parts = path.split("/")
            if _LAYERS not in parts:
                add(f"{prefix}{'/'.join(parts[:-1]) or path}", squares.sum())
                continue
            depth = parts.index(_LAYERS) + 1
            of_layers = squares.reshape(squares.shape[0], -1).sum(1)
            add(f"{prefix}{'/'.join(parts[: depth + 1])}", of_layers.sum())
            # Rows of what only some layers have, such as experts, are not numbered by layer.
            stack = "/".join(parts[:depth]) + "/"
            layers = max(other.shape[0] for name, other in leaves.items() if name.startswith(stack))
            for layer in range(squares.shape[0] if squares.shape[0] == layers else 0):
                add(f"{prefix}{'/'.join(parts[:depth])}/{layer}", of_layers[layer])
    return totals
