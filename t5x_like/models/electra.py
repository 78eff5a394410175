"""ELECTRA: a generator fills in masked tokens, and the encoder tells which tokens are its samples (Clark et al. 2020).

The two are trained together, each by its own loss: no gradient goes through a sample. They share the embeddings, which
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
from t5x_like.models.layers import Dense, activate
from t5x_like.models.model import Head, Model, encoder_mask, feature
from t5x_like.models.stacks import Stack
from t5x_like.monitoring.metrics import Mean
from t5x_like.outputs import Loss, Output

_PAD_ID = 0
_BLOCK = 128
DISCRIMINATOR_LOSS = "discriminator/loss"


class Electra(Model):
    """A model whose encoder is the discriminator; `encode` gives its states, as of any encoder."""

    head: ReplacedHead

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        """Raises ConfigError where the configuration is no model; all its problems are listed."""
        super().__init__(config, rngs)
        self.generator = Generator(config, rngs)

    def _make_head(self, stack: StackConfig, rngs: nnx.Rngs) -> nnx.Module:
        return ReplacedHead(stack, rngs=rngs)

    def output(self, batch: Mapping[str, Array], *, dropout_rng: Array | None = None) -> Output:
        """The generator's logits, and the discriminator's loss on text with the generator's samples in it.

        Reads the features of an encoder and its `encoder_target_tokens` and `encoder_loss_weights`: where these are
        above 0 the text has a sample.

        Args:
          dropout_rng: Key of dropout and of the samples; None for no dropout and samples from a fixed key.

        Returns:
          logits: float32 [B, S, V], of the generator: `encoder_target_tokens` at the masked places are its targets.
          losses: discriminator/loss, binary cross-entropy per token of text, nats.
          metrics: Of the discriminator, per token: accuracy; replaced, the share of tokens that are not the original (a
            sample that hits the original is no replacement), which is the error of one that calls none replaced;
            recall, of the replaced tokens those that it finds; precision, of those it calls replaced those that are.

        Raises:
          DataError: a feature is missing.
        """
        tokens = feature(batch, "encoder_input_tokens", self.config)
        original = feature(batch, "encoder_target_tokens", self.config)
        masked = feature(batch, "encoder_loss_weights", self.config) > 0
        segment_ids, positions = batch.get("encoder_segment_ids"), batch.get("encoder_positions")
        of_generator, of_discriminator, of_samples = None, None, jax.random.key(0)
        if dropout_rng is not None:
            of_generator, of_samples, of_discriminator = jax.random.split(dropout_rng, 3)

        logits = self.generate(tokens, segment_ids=segment_ids, positions=positions, dropout_rng=of_generator)
        corrupted = jnp.where(masked, sample(logits, of_samples), original)
        found = self.detect(corrupted, segment_ids=segment_ids, positions=positions, dropout_rng=of_discriminator)
        present = (tokens != _PAD_ID) if segment_ids is None else segment_ids != 0
        loss, metrics = detection(found, corrupted != original, present, self.config.discriminator_loss_weight)
        return Output(logits, {DISCRIMINATOR_LOSS: loss}, metrics)

    def generate(
        self,
        tokens_BxS: Array,
        *,
        segment_ids: Array | None = None,
        positions: Array | None = None,
        dropout_rng: Array | None = None,
    ) -> Array:
        """The generator's logits over the vocabulary, float32 [B, S, V], from masked text."""
        cells = jnp.arange(tokens_BxS.shape[1])[None] if positions is None else positions
        embedded = self.encoder.embed_positions(self._embed(tokens_BxS), cells)
        mask = encoder_mask(tokens_BxS, segment_ids)
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
        """float32 [B, S]: the logit of each token's having been replaced."""
        return self.head(self.encode(tokens_BxS, segment_ids=segment_ids, positions=positions, dropout_rng=dropout_rng))


class Generator(nnx.Module):
    """The smaller encoder and its head over the vocabulary."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        assert config.generator is not None
        stack = dataclasses.replace(config.generator, token_types=0)
        if stack.positions == "learned":
            stack = dataclasses.replace(stack, positions="none")
        # It reads embeddings that have their positions, kinds of tokens and norm already.
        shared = dataclasses.replace(config, embedding_width=config.table_width, embedding_norm=False)
        self.encoder = Stack(stack, shared, encoder_width=None, rngs=rngs)
        self.head = Head(config, stack, rngs=rngs)


class ReplacedHead(nnx.Module):
    """From states to one logit per token: dense, activation, dense."""

    def __init__(self, stack: StackConfig, *, rngs: nnx.Rngs):
        self.activation = stack.mlp_activation
        embed, stddev = ("embed", stack.d_model), stack.d_model**-0.5
        self.dense = Dense([embed], [("mlp", stack.d_model)], stddev=stddev, use_bias=stack.use_bias, rngs=rngs)
        # Most tokens are no replacements, whatever the states: the prior is in the bias.
        self.out = Dense([embed], [], stddev=stddev, use_bias=True, rngs=rngs)

    def __call__(self, x_BxLxd: Array) -> Array:
        """float32 [B, L]."""
        return self.out(activate(self.dense(x_BxLxd), self.activation), jnp.dtype(jnp.float32))


def sample(logits_BxLxV: Array, rng: Array) -> Array:
    """Tokens from softmax(logits), one for each cell; int32 [B, L], without a gradient. Never padding.

    By Gumbel noise, a block of the vocabulary first and then a token of it: V / 128 + 128 random numbers, where noise
    for every token would cost a third of the step on CPU.
    """
    logits = jax.lax.stop_gradient(logits_BxLxV)
    logits = jnp.where(jnp.arange(logits.shape[-1]) == _PAD_ID, -jnp.inf, logits)
    blocks = jnp.pad(logits, ((0, 0), (0, 0), (0, -logits.shape[-1] % _BLOCK)), constant_values=-jnp.inf)
    blocks_BxLxGxK = blocks.reshape(*logits.shape[:2], -1, _BLOCK)
    of_block, of_token = jax.random.split(rng)
    scores = jax.nn.logsumexp(blocks_BxLxGxK, axis=-1)
    block = jnp.argmax(scores + jax.random.gumbel(of_block, scores.shape), axis=-1)
    chosen = jnp.take_along_axis(blocks_BxLxGxK, block[..., None, None], axis=-2)[..., 0, :]
    token = jnp.argmax(chosen + jax.random.gumbel(of_token, chosen.shape), axis=-1)
    return (block * _BLOCK + token).astype(jnp.int32)


def detection(
    found_BxL: Array, replaced_BxL: Array, present_BxL: Array, coefficient: float
) -> tuple[Loss, dict[str, Mean]]:
    """The discriminator's loss and metrics.

    Args:
      found_BxL: Logits of having been replaced.
      replaced_BxL: bool, what is true.
      present_BxL: bool, False for padding, which does not count.
    """
    present = present_BxL.astype(jnp.float32)
    weight = jnp.sum(present)
    loss = jax.nn.softplus(found_BxL) - found_BxL * replaced_BxL
    replaced = replaced_BxL * present
    called = (found_BxL > 0) * present
    hits = jnp.sum(called * replaced)
    right = jnp.sum((called == replaced) * present)
    metrics = {
        "accuracy": Mean(right, weight),
        "replaced": Mean(jnp.sum(replaced), weight),
        "recall": Mean(hits, jnp.sum(replaced)),
        "precision": Mean(hits, jnp.sum(called)),
    }
    return Loss(jnp.sum(loss * present), weight, coefficient), {
        f"discriminator/{name}": mean for name, mean in metrics.items()
    }
