"""Learning rates that decay from the upper layers of a stack to the lower ones."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.sharding.rules import LogicalAxes
from t5x_like.training.optimizers.schedule_free import AveragingOptimizer, gradient_point
from t5x_like.utils import tree_paths
from t5x_like.utils.type_aliases import PyTree

_EMBEDDINGS = re.compile(
    r"(.*/)?((token_|position_|token_type_|encoder_token_|)embedder|\w*embedding\w*)/.*|unscaled_embedding"
)
"""Paths of the tables and rows that the lowest layer reads, and of their norm and projection."""


def with_layer_decay(optimizer: Any, logical_axes: PyTree, decay: float) -> AveragingOptimizer:
    """Return an optimizer whose updates are scaled layer by layer; see `TrainingConfig.layer_decay`.

    Updates are proportional to the learning rate, so that each layer trains as in a run with a learning rate of its
    own, weight decay included. The layers of a stack are one array, of which each slice has its factor.

    Args:
      optimizer: `update` takes the learning rate as a keyword.
      logical_axes: Logical axes of all parameters.
      decay: Factor from a layer to the one below it, above 0.

    Raises:
      ConfigError: no parameter is stacked over layers.
    """
    axes_of: dict[str, LogicalAxes] = tree_paths.by_path(logical_axes, is_leaf=lambda node: not isinstance(node, dict))
    if not any("layers" in axes for axes in axes_of.values()):
        found = "parameters without layers"
        raise ConfigError([ConfigProblem("training.layer_decay", found, "1.0, or a model with layers")])

    def update(
        grads: PyTree, state: PyTree, params: PyTree | None = None, **arguments: jax.Array
    ) -> tuple[PyTree, PyTree]:
        updates, state = optimizer.update(grads, state, params, **arguments)
        layers = [
            leaf.shape[axes_of[path].index("layers")]
            for path, leaf in tree_paths.by_path(updates).items()
            if "layers" in axes_of[path]
        ]

        def scaled(path: str, leaf: jax.Array) -> jax.Array:
            axes = axes_of[path]
            if "layers" in axes:
                dim = axes.index("layers")
                exponents = jnp.arange(leaf.shape[dim], 0, -1, dtype=jnp.float32)
                factors = jnp.power(decay, exponents).astype(leaf.dtype)
                return leaf * factors.reshape([-1 if other == dim else 1 for other in range(leaf.ndim)])
            # A table that both stacks read is below the higher one.
            return leaf * decay ** (max(layers, default=0) + 1) if _EMBEDDINGS.fullmatch(path) else leaf

        return tree_paths.map_by_path(scaled, updates), state

    return AveragingOptimizer(optimizer.init, update, lambda params, state: gradient_point(optimizer, params, state))
