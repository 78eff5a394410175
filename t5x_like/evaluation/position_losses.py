"""Loss by position: `t5x-like eval MODEL --loss-by-position`, how far the loss falls with the length of the context."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.data.stream import heldout
from t5x_like.distributed.coordination import compile_on_all
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.evaluation.per_example_loss import token_losses
from t5x_like.model_loading import LoadedModel
from t5x_like.program import Program
from t5x_like.utils.type_aliases import Features, PyTree


def position_scores(
    loaded: LoadedModel, *, step: int | None = None, num_batches: int | None = None, split: str = "validation"
) -> dict[str, Any]:
    """Return the mean held-out loss of each objective in bins of the positions of its targets' stack: 0, 1, 2 to 3, 4
    to 7, and so on. It scores the same rows as `eval`, with one example each.

    Args:
      loaded: A training run.
      step: Step of the model; None: the newest.
      num_batches: Batches of each objective; None: as configured.
      split: Split of the text.

    Returns:
      model, step, split, and `objectives`: by name, for each bin with scored tokens, the `first` and `last` position,
      `loss` (nats per token) and `tokens` (the sum of the loss weights).

    Raises:
      ConfigError: the model is not a run whose objectives predict tokens.
    """
    run, data = loaded.run, loaded.run.data
    if not loaded.has_data or data.labelled is not None or data.preference is not None or data.seqio is not None:
        expected = "a run with prepared text and language-model objectives"
        raise ConfigError([ConfigProblem("--loss-by-position", str(loaded.path), expected)])
    program, stores = loaded.program, loaded.stores
    found_step, params = loaded.params(step)
    batches, rows = num_batches or run.evaluation.num_batches, run.training.global_batch_size
    objectives = {}
    for share, store in zip(data.sources, stores, strict=True):
        for objective in data.objectives_of(share):
            some = heldout.objective_batches(store, data, share, rows, objective, batches, split)
            name = f"{share.name}/{objective.name}" if len(stores) > 1 else objective.name
            objectives[name] = binned(_sums(program, params, some))
    return {"model": str(loaded.path), "step": found_step, "split": split, "objectives": objectives}


def _sums(program: Program, params: PyTree, batches: Iterable[Mapping[str, Features]]) -> np.ndarray:
    """Return [2, L]: losses and weights, summed over the rows in double precision."""
    total: np.ndarray = np.zeros((2, 0))
    for batch in batches:
        placed = program.shard_global_batch(batch)["main"]
        if not total.size:
            compile_on_all(_position_sums, program, params, placed)
        sums_2xL = np.asarray(jax.device_get(_position_sums(program, params, placed)), np.float64)
        total = total + sums_2xL if total.size else sums_2xL
    return total


@functools.partial(jax.jit, static_argnums=0)
def _position_sums(program: Program, params: PyTree, features: Mapping[str, jax.Array]) -> jax.Array:
    with program.mesh_context():
        loss_RxL, weights_RxL = token_losses(program, params, features)
        sums_2xL = jnp.stack([jnp.sum(loss_RxL * weights_RxL, axis=0), jnp.sum(weights_RxL, axis=0)])
        return jax.lax.with_sharding_constraint(sums_2xL, NamedSharding(program.mesh, PartitionSpec()))


def binned(sums_2xL: np.ndarray) -> list[dict[str, Any]]:
    """Return the bins of losses and weights [2, L] by position, without those that have no weight."""
    bins: list[dict[str, Any]] = []
    first = 0
    while first < sums_2xL.shape[1]:
        last = max(2 * first - 1, first)
        loss, tokens = sums_2xL[:, first : last + 1].sum(axis=1).tolist()
        if tokens:
            last = min(last, sums_2xL.shape[1] - 1)
            bins.append({"first": first, "last": last, "loss": loss / tokens, "tokens": tokens})
        first = max(2 * first, first + 1)
    return bins
