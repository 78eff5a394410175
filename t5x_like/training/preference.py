"""Loss of preference pairs: direct preference optimization against the log-probabilities of a reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from t5x_like.config.batch_spec import CHOSEN_REFERENCE, REJECTED, REJECTED_REFERENCE
from t5x_like.config.objectives import Preference
from t5x_like.kernels.cross_entropy import cross_entropy
from t5x_like.model_output import AuxiliaryLoss, ModelOutput
from t5x_like.monitoring.metrics import WeightedMean
from t5x_like.sharding.constrain import constrain
from t5x_like.training.losses import ModelApply, Params, SubBatch, targets_and_weights


def preference_apply(apply: ModelApply, objective: Preference) -> ModelApply:
    """Return a function in place of `apply` that reports the preference loss of a sub-batch of pairs.

    Args:
      apply: (parameters, sub-batch, dropout key) -> logits of the model.
      objective: Objective of the pairs.

    Returns:
      A function with the loss of Rafailov et al. 2023, or with label smoothing that of Mitchell 2023, as its output's
      "loss", whose weight is the number of pairs: rows, or the segments of packed rows. Rows and segments without a
      chosen answer have weight 0. Its metrics, as means over pairs unless stated otherwise:
      preference_accuracy: 1 where the chosen answer has the higher reward.
      preference_margin: Difference of the two rewards.
      chosen_reward, rejected_reward: beta (log p(answer) - log p_ref(answer)).
      kl_to_reference: log p_ref - log p per token, over the tokens of both answers: an estimate of the KL divergence
        KL(p_ref | p) if the answers are samples of the reference. For others it can be negative.
    """

    def loss_of_pairs(params: Params, batch: SubBatch, rng: jax.Array | None) -> ModelOutput:
        output, log_probs_Px2, tokens_Px2 = answer_log_probs(apply, params, batch, rng)
        references = (batch[name].reshape(-1) for name in (CHOSEN_REFERENCE, REJECTED_REFERENCE))
        reference_Px2 = constrain(jnp.stack(list(references), axis=1), ("batch", None))
        is_pair_P = (tokens_Px2[:, 0] > 0).astype(jnp.float32)
        # Selected before they are used: rows that complete a batch have no reference, and 0 * NaN would be NaN.
        ratios_Px2 = jnp.where(is_pair_P[:, None] > 0, log_probs_Px2 - reference_Px2, 0.0)
        loss_P, rewards_Px2 = preference_loss(ratios_Px2, objective.beta, objective.label_smoothing)
        margin_P = rewards_Px2[:, 0] - rewards_Px2[:, 1]
        pairs = jnp.sum(is_pair_P)

        def mean(values_P: jax.Array) -> WeightedMean:
            return WeightedMean(jnp.sum(jax.lax.stop_gradient(values_P) * is_pair_P), pairs)

        metrics = {
            "preference_accuracy": mean((margin_P > 0).astype(jnp.float32)),
            "preference_margin": mean(margin_P),
            "chosen_reward": mean(rewards_Px2[:, 0]),
            "rejected_reward": mean(rewards_Px2[:, 1]),
            "kl_to_reference": WeightedMean(-jnp.sum(jax.lax.stop_gradient(ratios_Px2)), jnp.sum(tokens_Px2)),
        }
        loss = AuxiliaryLoss(jnp.sum(loss_P * is_pair_P), pairs, 1.0)
        return ModelOutput(None, {"loss": loss, **output.losses}, {**output.metrics, **metrics})

    return loss_of_pairs


def preference_loss(ratios_Px2: jax.Array, beta: float, label_smoothing: float) -> tuple[jax.Array, jax.Array]:
    """Return the loss of each pair [P] and the rewards of its answers [P, 2].

    Args:
      ratios_Px2: log p - log p_ref of the chosen and of the rejected answer, summed over their tokens.
      beta, label_smoothing: See `Preference`.
    """
    rewards_Px2 = beta * ratios_Px2
    h_P = rewards_Px2[:, 0] - rewards_Px2[:, 1]
    loss_P = -(1.0 - label_smoothing) * jax.nn.log_sigmoid(h_P) - label_smoothing * jax.nn.log_sigmoid(-h_P)
    return loss_P, rewards_Px2


def answer_log_probs(
    apply: ModelApply, params: Params, batch: SubBatch, rng: jax.Array | None
) -> tuple[ModelOutput, jax.Array, jax.Array]:
    """Return the model's output, the log-probabilities of both answers, and their numbers of tokens.

    Args:
      apply: (parameters, sub-batch, dropout key) -> logits of the model.
      params: Parameters.
      batch: Sub-batch of preference pairs: B rows of one pair, or B packed rows of up to S pairs.
      rng: Key of dropout; None: none.

    Returns:
      The output for 2 B rows of answers; float32 [P, 2], the sums of log p over the tokens of the chosen and of the
      rejected answer, with their EOS; and float32 [P, 2], the numbers of these tokens. P is B, or B S: the segments of
      each row, of which some may be empty.
    """
    answers = _stacked_answers(batch)
    output = apply(params, answers, rng)
    targets, weights = targets_and_weights(answers)
    loss, _ = cross_entropy(output.logits, targets)
    if "decoder_segment_ids" in answers:
        segments = jnp.arange(1, batch[CHOSEN_REFERENCE].shape[1] + 1)
        is_of_segment = answers["decoder_segment_ids"][:, :, None] == segments
    else:
        is_of_segment = jnp.ones((*weights.shape, 1), jnp.bool_)
    # Selected and not multiplied, so that a segment has the sum that it would have in a row of its own.
    sums = (jnp.sum(jnp.where(is_of_segment, x[:, :, None], 0.0), axis=1) for x in (-loss * weights, weights))
    # [2 B, S], the answers side by side, to pairs.
    log_probs, tokens = (
        constrain(jnp.swapaxes(x.reshape(-1, 2, x.shape[-1]), 1, 2).reshape(-1, 2), ("batch", None)) for x in sums
    )
    return output, log_probs, tokens


def _stacked_answers(batch: SubBatch) -> dict[str, jax.Array]:
    """Return the features of 2 B decoder rows, the answers of each pair side by side, and of B encoder rows.

    The model reads each row of the encoder for both answers. The rows of a pair are neighbours, so that each device
    keeps its own.
    """
    stacked = {name: values for name, values in batch.items() if name.startswith("encoder")}
    for name, values in batch.items():
        if f"{REJECTED}{name}" in batch:
            both = jnp.stack([values, batch[f"{REJECTED}{name}"]], axis=1).reshape(-1, values.shape[1])
            stacked[name] = constrain(both, ("batch", "length"))
    return stacked
