"""Task heads in place of the language-model head: classification, regression and embeddings.

Every encoder and every decoder can have one. Bidirectional attention of a decoder is a mask that comes with the batch
(`decoder_causal_attention`, as for a prefix-LM), so that an embedding model made from a decoder (LLM2Vec, GritLM) needs
no architecture of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t5x_like.config.batch_spec import POSITIVE, negative, negative_weights, texts_of
from t5x_like.config.model import ModelConfig, Pooling, StackConfig, TaskHeadConfig
from t5x_like.errors import DataError
from t5x_like.kernels.cross_entropy import cross_entropy
from t5x_like.model_output import AuxiliaryLoss, ModelOutput, Targets
from t5x_like.models.layers import Dense
from t5x_like.models.model import Model, decoder_non_padding_mask
from t5x_like.sharding.constrain import constrain

if TYPE_CHECKING:
    Batch = Mapping[str, Array]

_HIDDEN = -1e30
"""Logit of a document that does not count."""


class TaskModel(Model):
    """Model with a `TaskHeadConfig`.

    A batch has `labels` and `label_weights` besides the input tokens: [rows], or [rows, length] for token
    classification. Labels are class indices (int32), or the target numbers (float32) of regression. Rows of weight 0
    are not counted. Embeddings have no labels but `positive_input_tokens` and the features of hard negatives, if there
    are any (`config.batch_spec`). Each row holds one text; packed rows are refused.
    """

    head: TextHead

    def _make_head(self, stack: StackConfig, rngs: nnx.Rngs) -> nnx.Module:
        assert self.config.task_head is not None
        return TextHead(self.config.task_head, stack, rngs=rngs)

    def output(self, batch: Batch, *, dropout_rng: Array | None = None) -> ModelOutput:
        """Return logits with their targets, or only the loss for regression.

        Raises:
          DataError: a feature is missing, or rows are packed.
        """
        head = self.head.config
        if any(f"{stack}_positions" in batch for stack in self.config.stacks):
            raise DataError("found packed rows, expected one text per row: a task head has one output per row")
        if head.kind == "embedding":
            return self._contrast(batch, dropout_rng)
        labels, weights = (_required(batch, name) for name in ("labels", "label_weights"))
        weights = weights.astype(jnp.float32)
        scores, losses = self.scores(batch, dropout_rng=dropout_rng)
        match head.kind:
            case "token_classification":
                return ModelOutput(scores, losses, targets=Targets(labels, weights))
            case "classification":
                return ModelOutput(scores[:, None], losses, targets=Targets(labels[:, None], weights[:, None]))
            case "regression":
                # The model reports its own loss, since there are no logits; `losses.batch_metrics` takes it as the loss
                # of the step.
                error = jnp.square(scores - labels) * weights
                return ModelOutput(None, {"loss": AuxiliaryLoss(jnp.sum(error), jnp.sum(weights), 1.0), **losses})
            case unknown:
                assert_never(unknown)

    def scores(self, batch: Batch, *, dropout_rng: Array | None = None) -> tuple[Array, dict[str, AuxiliaryLoss]]:
        """Return the head's outputs in float32, and the auxiliary losses of the layers.

        The outputs are [B, classes] for classification, [B, L, classes] for token classification, [B] for regression
        and [B, d] for embeddings.
        """
        states_rng, head_rng = (None, None) if dropout_rng is None else jax.random.split(dropout_rng)
        states, losses = self.states(batch, dropout_rng=states_rng)
        return self.head(states, text_mask(self.config, batch), head_rng), losses

    def _contrast(self, batch: Batch, dropout_rng: Array | None) -> ModelOutput:
        """Return the InfoNCE loss of each row's text among the positives and hard negatives of the global batch.

        The losses of the prefixes of `TaskHeadConfig.matryoshka_dimensions` are auxiliary losses "matryoshka_{size}".
        """
        head = self.head.config
        texts, sides = stack_sides(self.config, batch)
        vectors, losses = self.scores(texts, dropout_rng=dropout_rng)
        # One pass over [rows * sides] texts, taken apart again: row r has its texts at r * sides, r * sides + 1, ...
        vectors_BxSxd = vectors.reshape(-1, sides, vectors.shape[-1])
        weights = _required(batch, "label_weights").astype(jnp.float32)
        counts_BxS = document_weights(batch, weights, sides)
        logits, targets = contrast(vectors_BxSxd, counts_BxS, head.temperature)
        factors = head.matryoshka_weights or (1.0,) * len(head.matryoshka_dimensions)
        for size, factor in zip(head.matryoshka_dimensions, factors, strict=True):
            prefix = shortened(vectors_BxSxd, size, normalize=head.normalize)
            loss, _ = cross_entropy(*contrast(prefix, counts_BxS, head.temperature))
            losses = {
                **losses,
                f"matryoshka_{size}": AuxiliaryLoss(jnp.sum(loss * weights), jnp.sum(weights), factor),
            }
        return ModelOutput(logits[:, None], losses, targets=Targets(targets[:, None], weights[:, None]))


class TextHead(nnx.Module):
    """Head that pools hidden states and projects them to task outputs."""

    def __init__(self, config: TaskHeadConfig, stack: StackConfig, *, rngs: nnx.Rngs):
        self.config = config
        embed, stddev = ("embed", stack.d_model), stack.d_model**-0.5
        if config.transform:
            self.transform = Dense([embed], [("mlp", stack.d_model)], stddev=stddev, use_bias=True, rngs=rngs)
        if config.outputs:
            # Small, so that a fresh head predicts nearly uniform classes.
            self.out = Dense([embed], [("labels", config.outputs)], stddev=0.02, use_bias=True, rngs=rngs)

    def __call__(self, states_BxLxd: Array, valid_BxL: Array, dropout_rng: Array | None = None) -> Array:
        """Return the outputs; see `TaskModel.scores`."""
        config = self.config
        x = states_BxLxd
        if config.pools:
            x = pool(x, valid_BxL, config.pooling)
        if config.transform:
            x = jnp.tanh(self.transform(x))
        if dropout_rng is not None and config.dropout_rate > 0:
            keep = jax.random.bernoulli(dropout_rng, 1 - config.dropout_rate, x.shape)
            x = jnp.where(keep, x / (1 - config.dropout_rate), 0.0).astype(x.dtype)
        match config.kind:
            case "embedding":
                x = x.astype(jnp.float32)
                return normalized(x) if config.normalize else x
            case "regression":
                return self.out(x, jnp.dtype(jnp.float32))[..., 0]
            case "classification" | "token_classification":
                return self.out(x, jnp.dtype(jnp.float32))
            case unknown:
                assert_never(unknown)


def pool(states_BxLxd: Array, valid_BxL: Array, pooling: Pooling) -> Array:
    """Return one state per row, [B, d]: that of the first valid token, the mean, or that of the last valid token.

    Rows without a valid token give 0 for the mean, else the state at index 0.
    """
    valid = valid_BxL.astype(jnp.bool_)
    match pooling:
        case "mean":
            weights = valid.astype(jnp.float32)
            total = jnp.einsum("bld,bl->bd", states_BxLxd.astype(jnp.float32), weights)
            return (total / jnp.maximum(jnp.sum(weights, axis=1), 1.0)[:, None]).astype(states_BxLxd.dtype)
        case "cls":
            # argmax returns the first of equal values, here the first True.
            index = jnp.argmax(valid, axis=1)
        case "last":
            index = jnp.max(jnp.where(valid, jnp.arange(valid.shape[1]), 0), axis=1)
        case unknown:
            assert_never(unknown)
    return jnp.take_along_axis(states_BxLxd, index[:, None, None], axis=1)[:, 0]


def normalized(x: Array) -> Array:
    """Return the vectors scaled to length 1, in float32."""
    x = x.astype(jnp.float32)
    # The bound keeps the gradient of a vector of zeros finite.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def shortened(vectors: Array, dimensions: int, *, normalize: bool) -> Array:
    """Return the first dimensions of vectors [..., d], scaled to length 1 if `normalize`, in float32."""
    prefix = vectors[..., :dimensions].astype(jnp.float32)
    return normalized(prefix) if normalize else prefix


def document_weights(batch: Batch, weights_B: Array, sides: int) -> Array:
    """Return float32 [B, S - 1]: 0 for the positives and hard negatives of rows of weight 0, and for negatives that a
    row does not have."""
    negatives = [_required(batch, negative_weights(number)) for number in range(1, sides - 1)]
    present = jnp.stack([jnp.ones_like(weights_B), *(x.astype(jnp.float32) for x in negatives)], axis=1)
    return present * weights_B[:, None]


def contrast(vectors_BxSxd: Array, weights_BxD: Array, temperature: float) -> tuple[Array, Array]:
    """Return the similarities for InfoNCE (van den Oord et al. 2018) with in-batch negatives.

    Args:
      vectors_BxSxd: Vectors of each row's text, its positive and its hard negatives.
      weights_BxD: Weights of the D = S - 1 documents of each row; documents of weight 0 are not used as negatives.
      temperature: Divisor of the products.

    Returns:
      float32 [B, (S - 1) B], the products of each row's text with the positives of all rows, then with their hard
      negatives, divided by the temperature; and int32 [B], the index of the row's own positive.
    """
    rows, sides, width = vectors_BxSxd.shape
    queries = constrain(vectors_BxSxd[:, 0], ("batch", None))
    # All positives first, then all hard negatives, gathered from all devices: every row sees the documents of the
    # global batch.
    documents_Nxd = constrain(jnp.swapaxes(vectors_BxSxd[:, 1:], 0, 1).reshape((sides - 1) * rows, width), (None, None))
    logits = jnp.einsum("bd,nd->bn", queries, documents_Nxd, preferred_element_type=jnp.float32) / temperature
    counts_N = constrain((weights_BxD > 0).T.reshape((sides - 1) * rows), (None,))
    own = jnp.arange(rows)
    # A row's own positive always counts, so that rows of weight 0 have a finite loss.
    counted = counts_N[None] | (own[:, None] == jnp.arange((sides - 1) * rows)[None])
    return jnp.where(counted, logits, _HIDDEN), own


def stack_sides(config: ModelConfig, batch: Batch) -> tuple[dict[str, Array], int]:
    """Return the texts of all sides as rows of one batch, and the number of sides.

    The texts of a row follow each other, so that one pass reads them all and each device keeps its rows.

    Raises:
      DataError: the batch has no positives, or the model has no padding id.
    """
    stack = _stack_name(config)
    names = [f"{stack}_input_tokens", POSITIVE, *(negative(number) for number in range(1, texts_of(batch) - 1))]
    sides = [_required(batch, name) for name in names]
    tokens = jnp.stack(sides, axis=1).reshape(-1, sides[0].shape[1])
    texts = {f"{stack}_input_tokens": constrain(tokens, ("batch", "length"))}
    if "decoder_causal_attention" in batch:
        texts["decoder_causal_attention"] = text_mask(config, texts).astype(jnp.int32)
    return texts, len(sides)


def text_mask(config: ModelConfig, batch: Batch) -> Array:
    """Return bool [B, L], True for tokens of the text; with segment ids, for tokens of any segment.

    Raises:
      DataError: there are no segment ids, and the model has no padding id.
    """
    stack = _stack_name(config)
    if f"{stack}_segment_ids" in batch:
        return batch[f"{stack}_segment_ids"] != 0
    tokens = batch[f"{stack}_input_tokens"]
    pad_id = config.pad_token_id
    if pad_id is None:
        # Rows of texts are padded. Without an id, all of their padding would count as text.
        raise DataError(
            f"found a batch without {stack}_segment_ids for a model without a padding id, expected one of the two: set "
            "model.pad_token_id to the id that the tokenizer pads with"
        )
    if stack == "encoder":
        return tokens != pad_id
    valid = decoder_non_padding_mask(tokens, pad_id)
    if pad_id in config.eos_ids:
        # A tokenizer without a padding id pads with EOS: the first one after a token of the text is the text's own.
        valid = valid.at[:, 1:].max(valid[:, :-1])
    return valid


def _stack_name(config: ModelConfig) -> str:
    return "decoder" if config.encoder is None else "encoder"


def _required(batch: Batch, name: str) -> Array:
    if name not in batch:
        raise DataError(f"the batch has no feature {name!r}, which the model's head reads; found {sorted(batch)}")
    return batch[name]
