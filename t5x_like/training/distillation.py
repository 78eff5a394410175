"""Distillation: the divergence of the model's distribution over the vocabulary from that of a frozen teacher.

The teacher is a function of the batch, or has been computed before: then the batch has its most likely tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from t5x_like.config import DistillationConfig
from t5x_like.config.batch_spec import TEACHER_IDS, TEACHER_LOG_PROBS
from t5x_like.model_output import AuxiliaryLoss, ModelOutput
from t5x_like.training.losses import ModelApply, Params, SubBatch, targets_and_weights

Teacher = Callable[[SubBatch], jax.Array]
"""Function sub-batch -> logits of the teacher, float32 [rows, length, vocabulary]."""


def distillation_apply(apply: ModelApply, teacher: Teacher | None, config: DistillationConfig) -> ModelApply:
    """Return a function in place of `apply` that adds the loss "distillation" and scales the cross-entropy.

    Args:
      apply: (parameters, sub-batch, dropout key) -> output of the model that is trained.
      teacher: Its teacher, without dropout; None: sub-batches have its most likely tokens (`config.top_k`).
      config: Weight and temperature.
    """

    def divergence_of(batch: SubBatch, logits: jax.Array) -> jax.Array:
        if teacher is not None:
            return kl_divergence(jax.lax.stop_gradient(teacher(batch)), logits, config.temperature)
        return top_k_divergence(batch[TEACHER_IDS], batch[TEACHER_LOG_PROBS], logits, config.temperature)

    def with_teacher(params: Params, batch: SubBatch, rng: jax.Array | None) -> ModelOutput:
        output = apply(params, batch, rng)
        _, weights = targets_and_weights(batch)
        divergence = divergence_of(batch, output.logits)
        # The gradient of the divergence at temperature T is 1 / T**2 as large as at 1 (Hinton et al. 2015, section 2).
        total = config.temperature**2 * jnp.sum(divergence * weights)
        loss = AuxiliaryLoss(total, jnp.sum(weights), config.weight)
        # The divergence reads all logits, so that a loss computed in chunks would save nothing.
        return output._replace(
            losses={**output.losses, "distillation": loss}, loss_coefficient=1.0 - config.weight, projection=None
        )

    return with_teacher


def kl_divergence(teacher_xV: jax.Array, student_xV: jax.Array, temperature: float) -> jax.Array:
    """Return KL(teacher | student) of the softmaxes of logits at a temperature, float32 [...], in nats.

    The backward pass keeps both logits and no other array of their size.
    """
    return _kl_divergence(teacher_xV.astype(jnp.float32), student_xV.astype(jnp.float32), temperature)


# Recomputed in the backward pass: the probabilities of both models are the largest arrays of a step.
@jax.checkpoint
def _kl_divergence(teacher_xV: jax.Array, student_xV: jax.Array, temperature: float) -> jax.Array:
    log_p, log_q = (jax.nn.log_softmax(x / temperature, axis=-1) for x in (teacher_xV, student_xV))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def top_k_divergence(
    ids_xK: jax.Array, log_probs_xK: jax.Array, student_xV: jax.Array, temperature: float
) -> jax.Array:
    """Return KL(teacher | student) over K + 1 outcomes, float32 [...], in nats: K tokens, and all the others as one.

    The divergence of such a coarser distribution is a lower bound of that over the vocabulary, and equal to it if K is
    the vocabulary size. Unlike a divergence of the K tokens alone, it has no gradient that draws the probability of the
    other tokens to 0, or to any other value than the teacher's.

    Args:
      ids_xK: int [..., K], different tokens.
      log_probs_xK: float32 [..., K], log-probabilities of the teacher at the temperature.
      student_xV: Logits of the student [..., V].
      temperature: Divisor of the logits.
    """
    return _top_k_divergence(ids_xK, log_probs_xK, student_xV.astype(jnp.float32), temperature)


@jax.checkpoint
def _top_k_divergence(ids: jax.Array, log_p: jax.Array, student: jax.Array, temperature: float) -> jax.Array:
    log_z = jax.nn.logsumexp(student / temperature, axis=-1, keepdims=True)
    log_q = jnp.take_along_axis(student, ids, axis=-1) / temperature - log_z
    divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    if ids.shape[-1] == student.shape[-1]:
        return divergence
    # Both are differences from 1 and have its rounding: a smaller remainder counts as this one.
    smallest = float(jnp.finfo(jnp.float32).eps)
    rest_p = jnp.maximum(-jnp.expm1(jnp.minimum(jax.nn.logsumexp(log_p, axis=-1), 0.0)), smallest)
    log_rest_q = jnp.log(-jnp.expm1(jnp.minimum(jax.nn.logsumexp(log_q, axis=-1), -smallest)))
    return divergence + rest_p * (jnp.log(rest_p) - log_rest_q)
