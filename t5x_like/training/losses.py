"""The loss of a batch as sums, so that packing, accumulation and sub-batches do not change what its mean is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from t5x_like.kernels.cross_entropy import cross_entropy
from t5x_like.monitoring.metrics import Mean, add
from t5x_like.outputs import Output, Targets

Params = Mapping[str, object]
SubBatch = Mapping[str, jax.Array]
Batch = Mapping[str, SubBatch]
Apply = Callable[[Params, SubBatch, jax.Array | None], jax.Array | Output]
"""(parameters, sub-batch, key of dropout and samples or None for none) -> logits [rows, length, vocabulary], or an
`Output` with further losses."""


def targets_and_weights(batch: SubBatch) -> tuple[jax.Array, jax.Array]:
    """Targets int [rows, length] and loss weights float32 [rows, length]: the decoder's, or an encoder's own."""
    stack = "decoder" if "decoder_target_tokens" in batch else "encoder"
    return batch[f"{stack}_target_tokens"], batch[f"{stack}_loss_weights"].astype(jnp.float32)


def sub_batch_metrics(
    logits: jax.Array,
    batch: SubBatch,
    *,
    z_loss: float,
    label_smoothing: float,
    denoisers: Sequence[str],
    of: Targets | None = None,
) -> dict[str, Mean]:
    """Sums over the tokens of a sub-batch, each with the sum of the loss weights. The targets are `of`, or the
    batch's.

    Returns:
      loss: cross-entropy, without the z term.
      z_loss: the z term.
      accuracy: 1 where no other token has a larger logit than the target.
      loss/<denoiser>: `loss` of the cells whose `denoiser_ids` are that name's index in `denoisers`; weight 0 without
        `denoiser_ids`. They are [rows], or [rows, length] where a row is packed from examples of several denoisers.
    """
    targets, weights = of or targets_and_weights(batch)
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


def is_of_logits(name: str) -> bool:
    """Whether a metric of this name is of the logits and their targets, and not the model's own."""
    return name in ("loss", "z_loss", "accuracy", "loss_tokens") or name.startswith("loss/")


def _is_best(logits: jax.Array, targets: jax.Array) -> jax.Array:
    logits = jax.lax.stop_gradient(logits)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (target_logits >= jnp.max(logits, axis=-1)).astype(jnp.float32)


def batch_metrics(
    apply: Apply,
    params: Params,
    batch: Batch,
    rng: jax.Array | None,
    *,
    z_loss: float,
    label_smoothing: float,
    denoisers: Sequence[str],
) -> tuple[dict[str, Mean], dict[str, float]]:
    """Metrics added over the sub-batches, each of which has a key of its own.

    Returns:
      The metrics: `sub_batch_metrics`, and the losses and metrics of the model's `Output` under their names.
      The coefficients of those losses by name.

    Raises:
      ValueError: the model reports something under a name that is taken.
    """
    metrics: dict[str, Mean] = {}
    coefficients: dict[str, float] = {}
    for index, name in enumerate(sorted(batch)):
        key = None if rng is None else jax.random.fold_in(rng, index)
        found = apply(params, batch[name], key)
        output = found if isinstance(found, Output) else Output(found)
        own = dict(output.losses)
        if output.logits is None:
            loss = own.pop("loss")
            mean = Mean(loss.sum, loss.weight)
            of_logits = {"loss": mean, "z_loss": Mean(jnp.zeros(()), loss.weight)}
            of_logits |= {f"loss/{only}": mean for only in denoisers}
        else:
            of_logits = sub_batch_metrics(
                output.logits,
                batch[name],
                z_loss=z_loss,
                label_smoothing=label_smoothing,
                denoisers=denoisers,
                of=output.targets,
            )
        losses = {of: Mean(loss.sum, loss.weight) for of, loss in own.items()}
        parts = (of_logits, losses, output.metrics)
        if len(set().union(*parts)) < sum(map(len, parts)):
            raise ValueError(f"a loss or metric of the model has a name that is taken: {[sorted(x) for x in parts]}")
        for part in parts:
            metrics = add(metrics, part)
        coefficients |= {of: loss.coefficient for of, loss in own.items()}
    return metrics, coefficients


def summed_loss(
    metrics: Mapping[str, Mean], coefficients: Mapping[str, float], of_batch: Mapping[str, Mean]
) -> jax.Array:
    """What a part of a batch adds to the loss that, divided by the batch's loss tokens, is minimised: its summed
    cross-entropy and z term, and of each further loss coefficient * sum * loss tokens / weight.

    Args:
      metrics: Of the part.
      coefficients: Of the further losses.
      of_batch: "loss" and the further losses of the whole batch, whose weights are read.
    """
    total = metrics["loss"].sum + metrics["z_loss"].sum
    tokens = of_batch["loss"].weight
    for name, coefficient in coefficients.items():
        weight = of_batch[name].weight
        scale = jnp.where(weight > 0, coefficient * tokens / jnp.maximum(weight, 1e-30), 0.0)
        total = total + jax.lax.stop_gradient(scale) * metrics[name].sum
    return total
