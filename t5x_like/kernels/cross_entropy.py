"""Cross-entropy over a vocabulary with z-loss and label smoothing, with its own gradient."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def cross_entropy(
    logits_xV: Array, targets_x: Array, *, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> tuple[Array, Array]:
    """Return the cross-entropy of each target and, separately, the z term z_loss * log(Z)**2.

    With label smoothing e the target distribution is 1 - e at the target and e / (V - 1) elsewhere. Its entropy is
    subtracted, so that a perfect prediction has loss 0 (as in T5X's `compute_weighted_cross_entropy`).

    Args:
      logits_xV: [..., V], any float type.
      targets_x: int [...], in [0, V).
      z_loss: Coefficient of the z term, which is not part of the loss.
      label_smoothing: Smoothing e, in [0, 1).

    Returns:
      (loss [...], z term [...]), float32, in nats. The backward pass keeps the logits and no other array of their size,
      and reads them once.
    """
    return _cross_entropy(logits_xV, targets_x, z_loss, label_smoothing)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _cross_entropy(logits: Array, targets: Array, z_loss: float, label_smoothing: float) -> tuple[Array, Array]:
    return _forward(logits, targets, z_loss, label_smoothing)[0]


def target_distribution(vocabulary: int, label_smoothing: float) -> tuple[float, float, float]:
    """Return the probability of the target, that of each other token, and the entropy of that distribution."""
    if label_smoothing == 0.0:
        return 1.0, 0.0, 0.0
    high, low = 1.0 - label_smoothing, label_smoothing / (vocabulary - 1)
    return high, low, -(high * math.log(high) + label_smoothing * math.log(low))


def _forward(
    logits: Array, targets: Array, z_loss: float, label_smoothing: float
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    high, low, entropy = target_distribution(logits.shape[-1], label_smoothing)
    # The only reductions over the vocabulary are this one and, with smoothing, a sum. On logits whose vocabulary is
    # split over devices each is one all-reduce of [rows, length].
    log_z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    # Converted after the lookup, which then needs no float32 copy of all logits, the largest array of a step.
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0].astype(jnp.float32)
    # - sum_v p_v (logit_v - log_z) with p_v = low everywhere plus (high - low) at the target.
    loss = log_z - (high - low) * at_target - entropy
    if low:
        loss = loss - low * jnp.sum(logits, axis=-1, dtype=jnp.float32)
    return (loss, z_loss * log_z**2), (logits, targets, log_z)


def _backward(
    z_loss: float,
    label_smoothing: float,
    residuals: tuple[Array, Array, Array],
    cotangents: tuple[Array, Array],
) -> tuple[Array, np.ndarray]:
    logits, targets, log_z = residuals
    # With p the softmax: d loss / d logit_v = p_v - target_v, and d (z log(Z)**2) / d logit_v = 2 z log(Z) p_v.
    d_loss, d_z = (cotangent[..., None] for cotangent in cotangents)
    high, low, _ = target_distribution(logits.shape[-1], label_smoothing)
    # Recomputed from the logits and log Z. Keeping the probabilities of the forward pass would double the largest array
    # of the step.
    softmax = jnp.exp(logits.astype(jnp.float32) - log_z[..., None])
    # The comparison is fused into the elementwise pass, so that no one-hot array is made.
    is_target = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    d_logits = (d_loss + 2.0 * z_loss * log_z[..., None] * d_z) * softmax - d_loss * jnp.where(is_target, high, low)
    # float0 is JAX's type for the cotangent of an integer argument.
    return d_logits.astype(logits.dtype), np.zeros(targets.shape, jax.dtypes.float0)


_cross_entropy.defvjp(_forward, _backward)
