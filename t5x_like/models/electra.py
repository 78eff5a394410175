"""ELECTRA: a generator fills in masked tokens and the encoder detects its samples (Clark et al. 2020).

Both are trained together, each with its own loss; no gradient flows through a sample. They share the embeddings, which
both losses train.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t5x_like.config.model import ModelConfig, StackConfig
from t5x_like.model_output import AuxiliaryLoss, ModelOutput
from t5x_like.models.layers import Dense, LMHead, activate
from t5x_like.models.model import Model, encoder_mask, feature, non_padding_mask
from t5x_like.models.stack import Stack
from t5x_like.monitoring.metrics import WeightedMean

_BLOCK = 128
"""Tokens per block of the vocabulary in `sample`."""
DISCRIMINATOR_LOSS = "discriminator/loss"


class Electra(Model):
    """Model whose encoder is the discriminator; `encode` returns its states, as for any encoder."""

    head: ReplacedHead

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        """Create the model.

        Raises:
          ConfigError: the configuration is not valid; all problems are listed.
        """
        super().__init__(config, rngs)
        self.generator = Generator(config, rngs)

    def _make_head(self, stack: StackConfig, rngs: nnx.Rngs) -> nnx.Module:
        return ReplacedHead(stack, rngs=rngs)

    def output(self, batch: Mapping[str, Array], *, dropout_rng: Array | None = None) -> ModelOutput:
        """Return the generator's logits, and the discriminator's loss on text that contains the generator's samples.

        Reads the features of an encoder, `encoder_target_tokens` and `encoder_loss_weights`. Tokens with a weight above
        0 are masked, and are replaced by samples in the discriminator's input.

        Args:
          batch: Features of the sub-batch, [B, S] each.
          dropout_rng: Key of dropout and of the samples; None: no dropout, and samples from a fixed key.

        Returns:
          logits: float32 [B, S, V], logits of the generator; its targets are `encoder_target_tokens` at masked tokens.
          losses: discriminator/loss, binary cross-entropy per token of text, in nats.
          metrics: Metrics of the discriminator per token. accuracy; replaced: share of tokens that differ from the
            original (a sample that equals the original is not a replacement), which is the error of always predicting
            "not replaced"; recall: share of the replaced tokens that are detected; precision: share of the detected
            tokens that are replaced.

        Raises:
          DataError: a feature is missing.
        """
        tokens = feature(batch, "encoder_input_tokens", self.config)
        original = feature(batch, "encoder_target_tokens", self.config)
        masked = feature(batch, "encoder_loss_weights", self.config) > 0
        segment_ids, positions = batch.get("encoder_segment_ids"), batch.get("encoder_positions")
        generator_rng, discriminator_rng, sample_rng = None, None, jax.random.key(0)
        if dropout_rng is not None:
            generator_rng, sample_rng, discriminator_rng = jax.random.split(dropout_rng, 3)

        logits = self.generate(tokens, segment_ids=segment_ids, positions=positions, dropout_rng=generator_rng)
        # Sampling has no gradient: the generator learns from its own loss only (Clark et al. 2020).
        pad_id = self.config.pad_token_id
        corrupted = jnp.where(masked, sample(logits, sample_rng, pad_id), original)
        replaced_logits = self.detect(
            corrupted, segment_ids=segment_ids, positions=positions, dropout_rng=discriminator_rng
        )
        present = non_padding_mask(tokens, pad_id) if segment_ids is None else segment_ids != 0
        loss, metrics = detection(
            replaced_logits, corrupted != original, present, self.config.discriminator_loss_weight
        )
        return ModelOutput(logits, {DISCRIMINATOR_LOSS: loss}, metrics)

    def generate(
        self,
        tokens_BxS: Array,
        *,
        segment_ids: Array | None = None,
        positions: Array | None = None,
        dropout_rng: Array | None = None,
    ) -> Array:
        """Return the generator's logits over the vocabulary, float32 [B, S, V], for masked text."""
        position_ids = jnp.arange(tokens_BxS.shape[1])[None] if positions is None else positions
        embedded = self.encoder.embed_positions(self._embed(tokens_BxS), position_ids)
        mask = encoder_mask(tokens_BxS, segment_ids, self.config.pad_token_id)
        states, *_ = self.generator.encoder(embedded, mask, positions=positions, dropout_rng=dropout_rng)
        return self.generator.head(states, self.token_embedder.embedding[...])

    def detect(
        self,
        tokens_BxS: Array,
        *,
        segment_ids: Array | None = None,
        positions: Array | None = None,
        dropout_rng: Array | None = None,
    ) -> Array:
        """Return the logit of each token being replaced, float32 [B, S]."""
        return self.head(self.encode(tokens_BxS, segment_ids=segment_ids, positions=positions, dropout_rng=dropout_rng))


class Generator(nnx.Module):
    """Small encoder with a head over the vocabulary that fills in masked tokens."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        assert config.generator is not None
        stack = dataclasses.replace(config.generator, num_token_types=0)
        if stack.positions == "learned":
            stack = dataclasses.replace(stack, positions="none")
        # Its input embeddings already include positions, token types and the norm.
        # The generator reads the discriminator's embeddings, whose width it projects to its own (Clark et al. 2020,
        # section 3.2).
        shared = dataclasses.replace(config, embedding_dim=config.lm_head_width, embedding_norm=False)
        self.encoder = Stack(stack, shared, encoder_width=None, rngs=rngs)
        self.head = LMHead(config, stack, rngs=rngs)


class ReplacedHead(nnx.Module):
    """Head that maps states to one logit per token: dense, activation, dense."""

    def __init__(self, stack: StackConfig, *, rngs: nnx.Rngs):
        self.activation = stack.mlp_activation
        embed, stddev = ("embed", stack.d_model), stack.d_model**-0.5
        self.dense = Dense([embed], [("mlp", stack.d_model)], stddev=stddev, use_bias=stack.use_bias, rngs=rngs)
        # Most tokens are not replaced, whatever the states: the bias learns this prior.
        self.out = Dense([embed], [], stddev=stddev, use_bias=True, rngs=rngs)

    def __call__(self, x_BxLxd: Array) -> Array:
        """Return the logits, float32 [B, L]."""
        return self.out(activate(self.dense(x_BxLxd), self.activation), jnp.dtype(jnp.float32))


def sample(logits_BxLxV: Array, rng: Array, pad_id: int | None) -> Array:
    """Sample one token per position from softmax(logits); int32 [B, L], without a gradient. `pad_id` is never sampled.

    Gumbel noise selects a block of 128 tokens of the vocabulary first and then a token within it. This takes
    V / 128 + 128 random numbers per position; noise for every token would cost a third of the step on CPU.
    """
    logits = jax.lax.stop_gradient(logits_BxLxV)
    if pad_id is not None:
        # A sampled padding id would hide its position from the discriminator.
        logits = jnp.where(jnp.arange(logits.shape[-1]) == pad_id, -jnp.inf, logits)
    # The padded entries have probability 0.
    blocks = jnp.pad(logits, ((0, 0), (0, 0), (0, -logits.shape[-1] % _BLOCK)), constant_values=-jnp.inf)
    blocks_BxLxGxK = blocks.reshape(*logits.shape[:2], -1, _BLOCK)
    block_rng, token_rng = jax.random.split(rng)
    # The log-probability of a block is the logsumexp of its logits, up to a constant.
    scores = jax.nn.logsumexp(blocks_BxLxGxK, axis=-1)
    block = jnp.argmax(scores + jax.random.gumbel(block_rng, scores.shape), axis=-1)
    chosen = jnp.take_along_axis(blocks_BxLxGxK, block[..., None, None], axis=-2)[..., 0, :]
    token = jnp.argmax(chosen + jax.random.gumbel(token_rng, chosen.shape), axis=-1)
    return (block * _BLOCK + token).astype(jnp.int32)


def detection(
    logits_BxL: Array, replaced_BxL: Array, present_BxL: Array, coefficient: float
) -> tuple[AuxiliaryLoss, dict[str, WeightedMean]]:
    """Return the discriminator's loss and metrics.

    Args:
      logits_BxL: Logits of being replaced.
      replaced_BxL: bool, the labels.
      present_BxL: bool, False for padding, which is not counted.
      coefficient: Weight of the loss.
    """
    present = present_BxL.astype(jnp.float32)
    weight = jnp.sum(present)
    # Binary cross-entropy of a logit, stable for logits of any size: log(1 + exp(x)) - x y.
    loss = jax.nn.softplus(logits_BxL) - logits_BxL * replaced_BxL
    replaced = replaced_BxL * present
    detected = (logits_BxL > 0) * present
    hits = jnp.sum(detected * replaced)
    # `detected` and `replaced` are both 0 at padding and would count as correct there without the factor.
    correct = jnp.sum((detected == replaced) * present)
    metrics = {
        "accuracy": WeightedMean(correct, weight),
        "replaced": WeightedMean(jnp.sum(replaced), weight),
        "recall": WeightedMean(hits, jnp.sum(replaced)),
        "precision": WeightedMean(hits, jnp.sum(detected)),
    }
    return AuxiliaryLoss(jnp.sum(loss * present), weight, coefficient), {
        f"discriminator/{name}": mean for name, mean in metrics.items()
    }
