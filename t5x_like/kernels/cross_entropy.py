"""Cross-entropy over a vocabulary with z-loss and label smoothing, and its gradient."""

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
    """Cross-entropy of each target, and z_loss * log(Z)**2 beside it.

    With label smoothing e the target distribution is 1 - e at the target and e / (V - 1) elsewhere, and its entropy is
    taken off, so that a perfect prediction has loss 0 (as T5X's `compute_weighted_cross_entropy`).

    Args:
      logits_xV: [..., V], any float type.
      targets_x: int [...], in [0, V).
      z_loss: Coefficient of the z term, which is not part of the first result.
      label_smoothing: In [0, 1).

    Returns:
      (loss [...], z term [...]), float32. The backward pass keeps the logits and nothing else of their size, and reads
      them once.
    """
    return _cross_entropy(logits_xV, targets_x, z_loss, label_smoothing)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _cross_entropy(logits: Array, targets: Array, z_loss: float, label_smoothing: float) -> tuple[Array, Array]:
    return _forward(logits, targets, z_loss, label_smoothing)[0]


def _target_distribution(vocabulary: int, label_smoothing: float) -> tuple[float, float, float]:
    """Probability of the target and of each other token, and the entropy of that distribution."""
    if label_smoothing == 0.0:
        return 1.0, 0.0, 0.0
    high, low = 1.0 - label_smoothing, label_smoothing / (vocabulary - 1)
    return high, low, -(high * math.log(high) + label_smoothing * math.log(low))


def _forward(
    logits: Array, targets: Array, z_loss: float, label_smoothing: float
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    high, low, entropy = _target_distribution(logits.shape[-1], label_smoothing)
    log_z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0].astype(jnp.float32)
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
    d_loss, d_z = (cotangent[..., None] for cotangent in cotangents)
    high, low, _ = _target_distribution(logits.shape[-1], label_smoothing)
    softmax = jnp.exp(logits.astype(jnp.float32) - log_z[..., None])
    # A comparison inside the elementwise pass; no one-hot array exists.
    is_target = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    d_logits = (d_loss + 2.0 * z_loss * log_z[..., None] * d_z) * softmax - d_loss * jnp.where(is_target, high, low)
    return d_logits.astype(logits.dtype), np.zeros(targets.shape, jax.dtypes.float0)


_cross_entropy.defvjp(_forward, _backward)
