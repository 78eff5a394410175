"""Loss of a batch as sums and weights, so that packing, accumulation and sub-batches do not change its mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from t5x_like.kernels.cross_entropy import cross_entropy
from t5x_like.kernels.linear_cross_entropy import LossSetting, TokenLosses, linear_cross_entropy
from t5x_like.model_output import ModelOutput, OutputProjection
from t5x_like.monitoring.metrics import WeightedMean, add
from t5x_like.sharding.constrain import loss_sharding
from t5x_like.sharding.loss_chunks import loss_chunk_tokens

Params = Mapping[str, object]
SubBatch = Mapping[str, jax.Array]
Batch = Mapping[str, SubBatch]
Apply = Callable[[Params, SubBatch, jax.Array | None], jax.Array | ModelOutput]
"""Function (parameters, sub-batch, key) -> logits [rows, length, vocabulary], or a `ModelOutput` with further losses.
The key is that of dropout and of samples; None: neither."""
ModelApply = Callable[[Params, SubBatch, jax.Array | None], ModelOutput]
"""The same of a model that returns a `ModelOutput`."""


def targets_and_weights(batch: SubBatch) -> tuple[jax.Array, jax.Array]:
    """Return targets int [rows, length] and loss weights float32 [rows, length] of the decoder, or else the encoder."""
    stack = "decoder" if "decoder_target_tokens" in batch else "encoder"
    return batch[f"{stack}_target_tokens"], batch[f"{stack}_loss_weights"].astype(jnp.float32)


def sub_batch_metrics(
    output: ModelOutput,
    batch: SubBatch,
    *,
    z_loss: float,
    label_smoothing: float,
    denoisers: Sequence[str],
    chunk_tokens: int | None = 0,
) -> dict[str, WeightedMean]:
    """Return sums over the tokens of a sub-batch, each with the sum of the loss weights.

    Args:
      output: Output with logits float32 [rows, length, vocabulary]; their targets come from the batch unless it has
        its own.
      batch: Sub-batch with targets, loss weights and, optionally, `denoiser_ids`: [rows], or [rows, length] where a
        row is packed from examples of several denoisers.
      z_loss: Coefficient of the z term.
      label_smoothing: Probability that is spread over the vocabulary.
      denoisers: Names that `denoiser_ids` are indices into.
      chunk_tokens: See `TrainingConfig.loss_chunk_tokens`.

    Returns:
      loss: cross-entropy, without the z term.
      z_loss: the z term.
      accuracy: 1 where no other token has a larger logit than the target.
      loss/<denoiser>: `loss` of the token positions of this denoiser; weight 0 without `denoiser_ids`.
    """
    # All sums are in float32, also for a model that computes in bfloat16: a bfloat16 sum of thousands of tokens would
    # lose the small terms.
    targets, weights = output.targets or targets_and_weights(batch)
    setting = LossSetting(z_loss, label_smoothing, output.loss_coefficient)
    losses = _chunked_losses(output.projection, targets, weights, setting, chunk_tokens)
    if losses is None:
        loss, z_term = cross_entropy(output.logits, targets, z_loss=z_loss, label_smoothing=label_smoothing)
        is_best, objective = is_best_token(output.logits, targets), None
    else:
        objective, loss, z_term, is_best = losses
    weight = jnp.sum(weights)
    metrics = {
        "loss": WeightedMean(jnp.sum(loss * weights), weight),
        "z_loss": WeightedMean(jnp.sum(z_term * weights), weight),
        "accuracy": WeightedMean(jnp.sum(is_best * weights), weight),
    }
    if objective is not None:
        # Only the objective, which includes the coefficient of the loss, has a gradient. The z term has the factor 1 in
        # `summed_loss`, so the gradient of the whole objective is attached to it; its value stays what it is.
        z_sum = metrics["z_loss"].sum + (objective - jax.lax.stop_gradient(objective))
        metrics["z_loss"] = WeightedMean(z_sum, weight)
    # Without ids, -1 matches no denoiser. One id per row is broadcast over the row's positions.
    ids = batch.get("denoiser_ids", jnp.full(targets.shape[:1], -1))
    ids_BxL = ids if ids.ndim == 2 else ids[:, None]
    # A one-hot mask [B, L, D] and one sum instead of a sum per denoiser: D is small, and the program does not grow with
    # it.
    is_of = (ids_BxL[:, :, None] == jnp.arange(len(denoisers))) * weights[:, :, None]
    sums = jnp.sum(loss[:, :, None] * is_of, axis=(0, 1))
    counts = jnp.sum(is_of, axis=(0, 1))
    return metrics | {f"loss/{name}": WeightedMean(sums[i], counts[i]) for i, name in enumerate(denoisers)}


def _chunked_losses(
    projection: OutputProjection | None,
    targets: jax.Array,
    weights: jax.Array,
    setting: LossSetting,
    chunk_tokens: int | None,
) -> TokenLosses | None:
    """Return the losses computed in chunks of tokens, or None if the logits are to be computed as a whole."""
    if projection is None:
        return None
    rows, length, width = projection.states.shape
    vocabulary = projection.kernel.shape[1]
    sharding = loss_sharding(rows, length, width, vocabulary)
    tokens = rows * length
    if sharding is not None:
        degree = sharding.mesh.shape
        tokens //= math.prod(degree[axis] for axis in (*sharding.batch, *sharding.length))
        vocabulary //= math.prod(degree[axis] for axis in sharding.vocab)
    count = loss_chunk_tokens(chunk_tokens, tokens, width, vocabulary)
    if not count and projection.is_padded:
        # One chunk of all tokens. The logits without padding, whose number no mesh axis may divide, would be gathered.
        count = tokens
    if not count:
        return None
    setting = setting._replace(
        softcap=projection.softcap, chunk_tokens=count, sharding=sharding, vocab_size=projection.vocab_size
    )
    return linear_cross_entropy(projection.states, projection.kernel, projection.bias, targets, weights, setting)


def is_of_logits(name: str) -> bool:
    """Return whether a metric concerns the logits and their targets, and is not one of the model's own."""
    return name in ("loss", "z_loss", "accuracy", "loss_tokens") or name.startswith("loss/")


def is_best_token(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return float32 [rows, length]: 1 where no other token has a larger logit than the target."""
    # The accuracy has no gradient. Stating this keeps it out of the backward pass.
    logits = jax.lax.stop_gradient(logits)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    # A comparison with the maximum and not an argmax: over a vocabulary that is split over devices, a maximum is one
    # small all-reduce, an argmax also has to exchange indices.
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
    chunk_tokens: int | None = 0,
) -> tuple[dict[str, WeightedMean], dict[str, float]]:
    """Return metrics summed over the sub-batches. Each sub-batch has a key of its own, folded from `rng`.

    Returns:
      The metrics of `sub_batch_metrics` with the losses and metrics of the model's `ModelOutput` under their names,
      and the coefficients of the model's losses by name; that of the cross-entropy, "loss", only if it is not 1.

    Raises:
      ValueError: the model reports a loss or metric under a name that is taken.
    """
    metrics: dict[str, WeightedMean] = {}
    coefficients: dict[str, float] = {}
    # Sorted, so that the index that is folded into the key does not depend on the order in which the batch was built.
    for index, name in enumerate(sorted(batch)):
        key = None if rng is None else jax.random.fold_in(rng, index)
        found = apply(params, batch[name], key)
        output = found if isinstance(found, ModelOutput) else ModelOutput(found)
        own = dict(output.losses)
        # A model without logits (a regression head) reports its own loss. It takes the place of the cross-entropy, so
        # that training, accumulation and evaluation treat it alike.
        if output.logits is None:
            loss = own.pop("loss")
            mean = WeightedMean(loss.sum, loss.weight)
            of_logits = {"loss": mean, "z_loss": WeightedMean(jnp.zeros(()), loss.weight)}
            of_logits |= {f"loss/{only}": mean for only in denoisers}
        else:
            of_logits = sub_batch_metrics(
                output,
                batch[name],
                z_loss=z_loss,
                label_smoothing=label_smoothing,
                denoisers=denoisers,
                chunk_tokens=chunk_tokens,
            )
        losses = {of: WeightedMean(loss.sum, loss.weight) for of, loss in own.items()}
        parts = (of_logits, losses, output.metrics)
        # A name that occurs twice would be added to another sum without an error.
        if len(set().union(*parts)) < sum(map(len, parts)):
            raise ValueError(f"a loss or metric of the model has a name that is taken: {[sorted(x) for x in parts]}")
        for part in parts:
            metrics = add(metrics, part)
        coefficients |= {of: loss.coefficient for of, loss in own.items()}
        if output.loss_coefficient != 1.0:
            coefficients["loss"] = output.loss_coefficient
    return metrics, coefficients


def summed_loss(
    metrics: Mapping[str, WeightedMean], coefficients: Mapping[str, float], of_batch: Mapping[str, WeightedMean]
) -> jax.Array:
    """Return the contribution of a part of a batch to the summed loss, which is minimised per loss token of the batch.

    The sum of the contributions, divided by the batch's loss tokens, is the mean cross-entropy (times its coefficient,
    mostly 1) with z term, and for each further loss coefficient * its mean over the batch: a part adds coefficient *
    sum * loss tokens / weight.

    Args:
      metrics: Metrics of the part.
      coefficients: Coefficients of the further losses, by name.
      of_batch: "loss" and the further losses of the whole batch; only their weights are read.
    """
    total = coefficients.get("loss", 1.0) * metrics["loss"].sum + metrics["z_loss"].sum
    tokens = of_batch["loss"].weight
    for name, coefficient in coefficients.items():
        if name == "loss" or coefficient == 0.0:
            continue
        weight = of_batch[name].weight
        # The step divides everything by the batch's loss tokens. A loss with another weight (a router's tokens, for
        # example) is therefore multiplied by them first. The ratio is a constant of the batch, hence no gradient
        # through it.
        scale = jnp.where(weight > 0, coefficient * tokens / jnp.maximum(weight, 1e-30), 0.0)
        total = total + jax.lax.stop_gradient(scale) * metrics[name].sum
    return total
