"""The loss of a batch as sums, so that packing, accumulation and sub-batches do not change what its mean is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from t5x_like.kernels.cross_entropy import cross_entropy
from t5x_like.monitoring.metrics import Mean, add

Params = Mapping[str, object]
SubBatch = Mapping[str, jax.Array]
Batch = Mapping[str, SubBatch]
Apply = Callable[[Params, SubBatch, jax.Array | None], jax.Array]
"""(parameters, sub-batch, dropout key or None for none) -> logits [rows, length, vocabulary]."""


def targets_and_weights(batch: SubBatch) -> tuple[jax.Array, jax.Array]:
    """Targets int [rows, length] and loss weights float32 [rows, length]: the decoder's, or an encoder's own."""
    stack = "decoder" if "decoder_target_tokens" in batch else "encoder"
    return batch[f"{stack}_target_tokens"], batch[f"{stack}_loss_weights"].astype(jnp.float32)


def sub_batch_metrics(
    logits: jax.Array, batch: SubBatch, *, z_loss: float, label_smoothing: float, denoisers: Sequence[str]
) -> dict[str, Mean]:
    """Sums over the tokens of a sub-batch, each with the sum of the loss weights.

    Returns:
      loss: cross-entropy, without the z term.
      z_loss: the z term.
      accuracy: 1 where no other token has a larger logit than the target.
      loss/<denoiser>: `loss` of the cells whose `denoiser_ids` are that name's index in `denoisers`; weight 0 without
        `denoiser_ids`. They are [rows], or [rows, length] where a row is packed from examples of several denoisers.
    """
    targets, weights = targets_and_weights(batch)
    loss, z_term = cross_entropy(logits, targets, z_loss=z_loss, label_smoothing=label_smoothing)
    weight = jnp.sum(weights)
    metrics = {
        "loss": Mean(jnp.sum(loss * weights), weight),
        "z_loss": Mean(jnp.sum(z_term * weights), weight),
        "accuracy": Mean(jnp.sum(_is_best(logits, targets) * weights), weight),
    }
    ids = batch.get("denoiser_ids", jnp.full(targets.shape[:1], -1))
    ids_BxL = ids if ids.ndim == 2 else ids[:, None]
    is_of = (ids_BxL[:, :, None] == jnp.arange(len(denoisers))) * weights[:, :, None]
    sums = jnp.sum(loss[:, :, None] * is_of, axis=(0, 1))
    counts = jnp.sum(is_of, axis=(0, 1))
    return metrics | {f"loss/{name}": Mean(sums[i], counts[i]) for i, name in enumerate(denoisers)}


def _is_best(logits: jax.Array, targets: jax.Array) -> jax.Array:
    logits = jax.lax.stop_gradient(logits)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (target_logits >= jnp.max(logits, axis=-1)).astype(jnp.float32)


def batch_metrics(
    apply: Apply,
    params: Params,
    batch: Batch,
    dropout_rng: jax.Array | None,
    *,
    z_loss: float,
    label_smoothing: float,
    denoisers: Sequence[str],
) -> dict[str, Mean]:
    """`sub_batch_metrics` added over the sub-batches, each of which has a dropout key of its own."""
    metrics: dict[str, Mean] = {}
    for index, name in enumerate(sorted(batch)):
        rng = None if dropout_rng is None else jax.random.fold_in(dropout_rng, index)
        logits = apply(params, batch[name], rng)
        of_this = sub_batch_metrics(
            logits, batch[name], z_loss=z_loss, label_smoothing=label_smoothing, denoisers=denoisers
        )
        metrics = add(metrics, of_this)
    return metrics
