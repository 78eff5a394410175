"""Heads for whole texts: classes, numbers and embeddings, in the place of the head over the vocabulary.

Every encoder and every decoder can have one. What a decoder sees in both directions is a mask that comes with the batch
(`decoder_causal_attention`, as for a prefix LM), so that an embedding model made from a decoder (LLM2Vec, GritLM) is no
architecture of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t5x_like.config.errors import DataError
from t5x_like.config.model import ModelConfig, Pooling, StackConfig, TaskHead
from t5x_like.models.layers import Dense
from t5x_like.models.model import Model, not_padding
from t5x_like.outputs import Loss, Output, Targets
from t5x_like.partitioning.constrain import constrain

if TYPE_CHECKING:
    Batch = Mapping[str, Array]

POSITIVE, NEGATIVE = "positive_input_tokens", "negative_input_tokens"
"""Of pairs: the text that belongs to the row's own, and one that does not although it looks so (a hard negative)."""
_HIDDEN = -1e30


class TaskModel(Model):
    """A model with a `TaskHead`.

    A batch has `labels` and `label_weights` beside the input tokens: [rows], or [rows, length] for token
    classification. Labels are numbers of classes (int32) or what is to be said (float32, of regression). Rows of weight
    0 do not count. For embeddings there are no labels, but `positive_input_tokens` and where there are any
    `negative_input_tokens`. Rows hold one text each: packed rows have no head.
    """

    head: TextHead

    def _make_head(self, stack: StackConfig, rngs: nnx.Rngs) -> nnx.Module:
        assert self.config.task_head is not None
        return TextHead(self.config.task_head, stack, rngs=rngs)

    def output(self, batch: Batch, *, dropout_rng: Array | None = None) -> Output:
        """Logits and their targets; or without logits the squared error or the contrastive loss.

        Raises:
          DataError: a feature is missing, or rows are packed.
        """
        head = self.head.config
        if any(f"{stack}_positions" in batch for stack in self.config.stacks):
            raise DataError("found packed rows, expected one text per row: a head says one thing of each row")
        if head.kind == "embedding":
            return self._contrast(batch, dropout_rng)
        labels, weights = (_required(batch, name) for name in ("labels", "label_weights"))
        weights = weights.astype(jnp.float32)
        scores, losses = self.scores(batch, dropout_rng=dropout_rng)
        if head.kind == "token_classification":
            return Output(scores, losses, targets=Targets(labels, weights))
        if head.kind == "classification":
            return Output(scores[:, None], losses, targets=Targets(labels[:, None], weights[:, None]))
        error = jnp.square(scores - labels) * weights
        return Output(None, {"loss": Loss(jnp.sum(error), jnp.sum(weights), 1.0), **losses})

    def scores(self, batch: Batch, *, dropout_rng: Array | None = None) -> tuple[Array, dict[str, Loss]]:
        """What the head says, float32, and the losses of the layers below it: [B, classes]; [B, L, classes] of token
        classification, [B] of regression, [B, d] of embeddings."""
        of_states, of_head = (None, None) if dropout_rng is None else jax.random.split(dropout_rng)
        states, losses = self.states(batch, dropout_rng=of_states)
        return self.head(states, valid_cells(self.config, batch), of_head), losses

    def _contrast(self, batch: Batch, dropout_rng: Array | None) -> Output:
        """Each row's text among the positives and hard negatives of all rows: InfoNCE over the global batch."""
        head = self.head.config
        texts, sides = together(self.config, batch)
        vectors, losses = self.scores(texts, dropout_rng=dropout_rng)
        vectors_BxSxd = vectors.reshape(-1, sides, vectors.shape[-1])
        weights = _required(batch, "label_weights").astype(jnp.float32)
        logits, targets = contrast(vectors_BxSxd, weights, head.temperature)
        return Output(logits[:, None], losses, targets=Targets(targets[:, None], weights[:, None]))


class TextHead(nnx.Module):
    """From the states of a text's tokens to what is said of it."""

    def __init__(self, config: TaskHead, stack: StackConfig, *, rngs: nnx.Rngs):
        self.config = config
        embed, stddev = ("embed", stack.d_model), stack.d_model**-0.5
        if config.transform:
            self.transform = Dense([embed], [("mlp", stack.d_model)], stddev=stddev, use_bias=True, rngs=rngs)
        if config.outputs:
            # Small, so that a fresh head says nothing yet of classes that the states know nothing about.
            self.out = Dense([embed], [("labels", config.outputs)], stddev=0.02, use_bias=True, rngs=rngs)

    def __call__(self, states_BxLxd: Array, valid_BxL: Array, dropout_rng: Array | None = None) -> Array:
        """See `TaskModel.scores`."""
        config = self.config
        x = states_BxLxd
        if config.kind != "token_classification":
            x = pool(x, valid_BxL, config.pooling)
        if config.transform:
            x = jnp.tanh(self.transform(x))
        if dropout_rng is not None and config.dropout_rate > 0:
            keep = jax.random.bernoulli(dropout_rng, 1 - config.dropout_rate, x.shape)
            x = jnp.where(keep, x / (1 - config.dropout_rate), 0.0).astype(x.dtype)
        if config.kind == "embedding":
            x = x.astype(jnp.float32)
            return normalized(x) if config.normalize else x
        scores = self.out(x, jnp.dtype(jnp.float32))
        return scores[..., 0] if config.kind == "regression" else scores


def pool(states_BxLxd: Array, valid_BxL: Array, pooling: Pooling) -> Array:
    """[B, d]: the first valid cell's state, the mean of the valid cells' or the last one's. Rows without a valid cell
    are 0, or the first cell's."""
    valid = valid_BxL.astype(jnp.bool_)
    if pooling == "mean":
        weights = valid.astype(jnp.float32)
        total = jnp.einsum("bld,bl->bd", states_BxLxd.astype(jnp.float32), weights)
        return (total / jnp.maximum(jnp.sum(weights, axis=1), 1.0)[:, None]).astype(states_BxLxd.dtype)
    if pooling == "cls":
        place = jnp.argmax(valid, axis=1)
    else:
        place = jnp.max(jnp.where(valid, jnp.arange(valid.shape[1]), 0), axis=1)
    return jnp.take_along_axis(states_BxLxd, place[:, None, None], axis=1)[:, 0]


def normalized(x: Array) -> Array:
    """Vectors of length 1, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def contrast(vectors_BxSxd: Array, weights_B: Array, temperature: float) -> tuple[Array, Array]:
    """Similarities for InfoNCE (van den Oord et al. 2018) with in-batch negatives.

    Args:
      vectors_BxSxd: Of each row the text, its positive and its hard negatives.
      weights_B: Rows of weight 0 are nobody's negatives.

    Returns:
      float32 [B, (S - 1) B]: each row's text with the positives of all rows, then with their hard negatives, over the
      temperature; and int32 [B], which of them is its own positive.
    """
    rows, sides, width = vectors_BxSxd.shape
    queries = constrain(vectors_BxSxd[:, 0], ("batch", None))
    documents_Nxd = constrain(jnp.swapaxes(vectors_BxSxd[:, 1:], 0, 1).reshape((sides - 1) * rows, width), (None, None))
    logits = jnp.einsum("bd,nd->bn", queries, documents_Nxd, preferred_element_type=jnp.float32) / temperature
    counts_N = jnp.tile(weights_B > 0, sides - 1)
    own = jnp.arange(rows)
    seen = counts_N[None] | (own[:, None] == jnp.arange((sides - 1) * rows)[None])
    return jnp.where(seen, logits, _HIDDEN), own


def together(config: ModelConfig, batch: Batch) -> tuple[dict[str, Array], int]:
    """The texts of all sides as rows of one batch, a row's own one after the other, so that one pass reads them all
    and each device keeps its rows; and how many sides there are.

    Raises:
      DataError: no positives.
    """
    own = _stack_name(config)
    sides = [_required(batch, f"{own}_input_tokens"), _required(batch, POSITIVE)]
    if NEGATIVE in batch:
        sides.append(batch[NEGATIVE])
    tokens = jnp.stack(sides, axis=1).reshape(-1, sides[0].shape[1])
    texts = {f"{own}_input_tokens": constrain(tokens, ("batch", "length"))}
    if "decoder_causal_attention" in batch:
        texts["decoder_causal_attention"] = not_padding(tokens).astype(jnp.int32)
    return texts, len(sides)


def valid_cells(config: ModelConfig, batch: Batch) -> Array:
    """bool [B, L]: the cells that hold the text. With segment ids, those of any segment."""
    own = _stack_name(config)
    if f"{own}_segment_ids" in batch:
        return batch[f"{own}_segment_ids"] != 0
    tokens = batch[f"{own}_input_tokens"]
    return tokens != 0 if own == "encoder" else not_padding(tokens)


def _stack_name(config: ModelConfig) -> str:
    return "decoder" if config.encoder is None else "encoder"


def _required(batch: Batch, name: str) -> Array:
    if name not in batch:
        raise DataError(f"the batch has no feature {name!r}, which the model's head reads; found {sorted(batch)}")
    return batch[name]
