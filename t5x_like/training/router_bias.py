"""Biases of routers, moved by the load of the experts (Wang et al. 2024, auxiliary-loss-free load balancing)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from t5x_like.config import RunConfig
from t5x_like.model_output import TOKENS_PER_EXPERT
from t5x_like.monitoring.metrics import WeightedMean
from t5x_like.training.freezing import is_router_bias, start_steps
from t5x_like.utils import tree_paths
from t5x_like.utils.type_aliases import PyTree

Metrics = dict[str, WeightedMean]


def without_counts(metrics: Mapping[str, WeightedMean]) -> tuple[Metrics, dict[str, jax.Array]]:
    """Return the metrics without the tokens per expert, and these by the name of their stack, float32 [N, E]."""
    counts = {
        name.removeprefix(TOKENS_PER_EXPERT): mean.sum
        for name, mean in metrics.items()
        if name.startswith(TOKENS_PER_EXPERT)
    }
    return {name: mean for name, mean in metrics.items() if not name.startswith(TOKENS_PER_EXPERT)}, counts


def moved(
    frozen: PyTree, counts: Mapping[str, jax.Array], run: RunConfig, paths: Sequence[str], step: jax.Array
) -> PyTree:
    """Return the parameters without a gradient after a step: b + rate * sign(mean load - load) for biases of routers.

    Loads are summed over the whole batch: all its sub-batches, accumulation parts and devices. A bias that
    `training.freeze` names stays as it is.

    Args:
      frozen: Parameters that are not trained by gradients, among them the biases [layers, experts].
      counts: Tokens of each expert by the name of the stack, float32 [layers, experts].
      run: Configuration with the rates.
      paths: Paths of all parameters.
      step: Number of the step.
    """
    starts = start_steps(run.training.freeze, paths)

    def one(path: str, bias: jax.Array) -> jax.Array:
        stack = path.split("/")[0]
        start = starts.get(path)
        if not is_router_bias(path) or start is None or stack not in counts:
            return bias
        experts = run.model.stacks[stack].experts
        assert experts is not None and experts.bias_update_rate is not None
        load = counts[stack]
        new = bias + experts.bias_update_rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
        return jnp.where(step >= start, new, bias) if start else new

    return tree_paths.map_by_path(one, frozen)
