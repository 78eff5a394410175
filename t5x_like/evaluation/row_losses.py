"""The loss of each held-out row, which a mean does not show: for intervals and for paired comparison."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.data.tokenizers import Tokenizer
from t5x_like.kernels.cross_entropy import cross_entropy
from t5x_like.program import Program
from t5x_like.training.losses import targets_and_weights

Tree = Any
Features = Mapping[str, npt.NDArray[Any]]


def row_losses(
    program: Program, params: Tree, batches: Iterable[Mapping[str, Features]], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Of each row with a weight, in order: loss (summed, nats), tokens, the bytes that its scored tokens stand for, and
    a digest of these bytes, by which rows of two models are known to be of the same text."""
    found = []
    for batch in batches:
        features = batch["main"]
        sums_R, weights_R = jax.device_get(_row_losses(program, params, program.put_whole(batch)["main"]))
        targets, weights = targets_and_weights(features)  # type: ignore[arg-type]
        for row in np.flatnonzero(weights_R):
            scored = np.asarray(targets[row])[np.asarray(weights[row]) > 0]
            text = tokenizer.to_bytes(scored.tolist())
            found.append(
                {
                    "loss": float(sums_R[row]),
                    "tokens": float(weights_R[row]),
                    "bytes": len(text),
                    "digest": hashlib.sha256(text).hexdigest()[:16],
                }
            )
    return found


@functools.partial(jax.jit, static_argnums=0)
def _row_losses(program: Program, params: Tree, features: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(summed loss [R], summed weight [R]), on every device."""
    with program.activations():
        output = program.model(params).output(features)
        targets, weights = output.targets or targets_and_weights(features)
        loss_RxL, _ = cross_entropy(output.logits, targets, z_loss=0.0, label_smoothing=0.0)
        weights_RxL = weights.astype(jnp.float32)
        sums = jnp.sum(loss_RxL * weights_RxL, axis=-1), jnp.sum(weights_RxL, axis=-1)
        return jax.lax.with_sharding_constraint(sums, NamedSharding(program.mesh, PartitionSpec()))
