"""Distillation: the divergence of the model's distribution over the vocabulary from that of a frozen teacher."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from t5x_like.config import DistillationConfig
from t5x_like.model_output import AuxiliaryLoss, ModelOutput
from t5x_like.training.losses import ModelApply, Params, SubBatch, targets_and_weights

Teacher = Callable[[SubBatch], jax.Array]
"""Function sub-batch -> logits of the teacher, float32 [rows, length, vocabulary]."""


def distillation_apply(apply: ModelApply, teacher: Teacher, config: DistillationConfig) -> ModelApply:
    """Return a function in place of `apply` that adds the loss "distillation" and scales the cross-entropy.

    Args:
      apply: (parameters, sub-batch, dropout key) -> output of the model that is trained.
      teacher: Its teacher, without dropout.
      config: Weight and temperature.
    """

    def with_teacher(params: Params, batch: SubBatch, rng: jax.Array | None) -> ModelOutput:
        output = apply(params, batch, rng)
        _, weights = targets_and_weights(batch)
        divergence = kl_divergence(jax.lax.stop_gradient(teacher(batch)), output.logits, config.temperature)
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
