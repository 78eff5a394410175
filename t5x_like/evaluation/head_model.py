"""A model with a task head that predicts for texts: labels with probabilities, labels of words, or numbers."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any, assert_never, cast

import jax
import numpy as np
import numpy.typing as npt
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_like.config import ModelConfig, ShardingConfig, TaskHeadConfig
from t5x_like.config.layouts import has_bidirectional_prefix
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.evaluation.word_labels import entities
from t5x_like.model_loading import LoadedModel
from t5x_like.models.factory import abstract_model, bind_params
from t5x_like.models.model import Model
from t5x_like.models.task_heads import TaskModel
from t5x_like.sharding.constrain import activation_context
from t5x_like.sharding.mesh import make_mesh
from t5x_like.sharding.rules import Rules, default_rules
from t5x_like.sharding.shardings import tree_shardings
from t5x_like.text_inputs.batches import batch_rows, batches
from t5x_like.text_inputs.encoding import LONGEST, Encode, encode_function, max_positions
from t5x_like.utils.type_aliases import PyTree

Prediction = dict[str, Any]
"""Fields of a prediction: `prediction` (a label, the labels of the words, or a number) and what belongs to it."""


@dataclasses.dataclass(frozen=True, eq=False)
class HeadModel:
    """Model with a task head.

    Attributes:
      loaded: The model as it was opened.
      step: Step of its parameters.
      encode: Text to ids.
      max_length: Number of tokens to which longer texts are truncated.
      bidirectional: Each token of a decoder attends to the whole text.
    """

    loaded: LoadedModel
    step: int
    encode: Encode
    max_length: int
    bidirectional: bool
    graphdef: nnx.GraphDef[Model]
    params: PyTree
    mesh: Mesh
    rules: Rules

    @property
    def config(self) -> ModelConfig:
        return self.loaded.model

    @property
    def head(self) -> TaskHeadConfig:
        return require_head(self.loaded)

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """Return a prediction for each text.

        Returns:
          classification: prediction, probability, and probabilities of all labels. token_classification: prediction
          (the labels of the words, separated by spaces), probabilities of these labels, and spans (label, start, end
          and text of each entity, in characters); words after `max_length` tokens have no label, and `truncated` is
          true. regression: prediction, a number.
        """
        rows = self.encode(texts, self.max_length)
        shares = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        found: list[Prediction] = [{} for _ in texts]
        for length, indices in batches([len(row) for row in rows], self.max_length, shares):
            # Each length has one number of rows, so that it is compiled once.
            filled = [rows[index] for index in indices]
            filled += [rows[indices[0]]] * (batch_rows(length, shares) - len(filled))
            scores = self._scores(filled, length)
            for index, score in zip(indices, scores[: len(indices)], strict=True):
                found[index] = self._prediction(texts[index], rows[index], score)
        return found

    def _scores(self, rows: Sequence[Sequence[int]], length: int) -> npt.NDArray[np.float32]:
        tokens = np.full((len(rows), length), self.config.pad_token_id or 0, np.int32)
        valid = np.zeros((len(rows), length), np.int32)
        for index, ids in enumerate(rows):
            tokens[index, : len(ids)], valid[index, : len(ids)] = ids, 1
        sharding = NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))
        placed = [jax.device_put(part, sharding) for part in (tokens, valid)]
        return np.asarray(_head_outputs(self, self.params, *placed))

    def _prediction(self, text: str, ids: Sequence[int], scores: npt.NDArray[np.float32]) -> Prediction:
        head = self.head
        match head.kind:
            case "classification":
                p_C = _softmax(scores)
                best = int(p_C.argmax())
                probabilities = {label: round(float(p), 6) for label, p in zip(head.labels, p_C, strict=True)}
                return {
                    "prediction": head.labels[best],
                    "probability": round(float(p_C[best]), 6),
                    "probabilities": probabilities,
                }
            case "token_classification":
                return self._word_labels(text, ids, scores)
            case "regression":
                return {"prediction": float(scores)}
            case "embedding":
                raise AssertionError("an embedding is not a prediction; `open_head` refuses it")
            case unknown:
                assert_never(unknown)

    def _word_labels(self, text: str, ids: Sequence[int], scores_LxC: npt.NDArray[np.float32]) -> Prediction:
        head, tokenizer = self.head, self.loaded.tokenizer
        own = tokenizer.encode(text)
        # The ids of the text follow the special tokens in front of it.
        first = next((index for index, token in enumerate(ids) if own[:1] == [token]), 0)
        words = list(re.finditer(r"\S+", text))
        starts = [first + start for start in tokenizer.word_starts(text)]
        last = min(first + len(own), self.max_length - 1)
        positions = [position for position in starts[: len(words)] if position < last]
        p_WxC = _softmax(scores_LxC[positions])
        labels = [head.labels[best] for best in p_WxC.argmax(-1).tolist()]
        spans = [
            {
                "label": entity.type,
                "start": words[entity.start].start(),
                "end": words[entity.stop - 1].end(),
                "text": text[words[entity.start].start() : words[entity.stop - 1].end()],
            }
            for entity in entities(labels)
        ]
        prediction: Prediction = {
            "prediction": " ".join(labels),
            "probabilities": [round(float(p), 6) for p in p_WxC.max(-1)] if labels else [],
            "spans": spans,
        }
        return prediction | ({"truncated": True} if len(labels) < len(words) else {})


def require_head(loaded: LoadedModel) -> TaskHeadConfig:
    """Return the head of a model that predicts.

    Raises:
      ConfigError: the model has no head, or one for embeddings.
    """
    head = loaded.model.task_head
    if head is None:
        fix = "`generate` answers prompts by a model of text"
        raise ConfigError([ConfigProblem(str(loaded.path), "a model without a task head", "one with a head", fix)])
    if head.kind == "embedding":
        expected = "classification, token_classification or regression"
        raise ConfigError(
            [ConfigProblem(str(loaded.path), "a head for embeddings", expected, "`embed` writes the embeddings")]
        )
    return head


def open_head(loaded: LoadedModel, step: int | None = None) -> HeadModel:
    """Restore a model with a task head.

    Raises:
      UserError: the model has no head that predicts, no tokenizer, or no such step.
    """
    require_head(loaded)
    config, data = loaded.model, loaded.trained_on
    length = LONGEST if data is None else data.inputs_length if config.encoder is not None else data.row_length
    most = max_positions(config)
    encode = encode_function(loaded)
    mesh, rules = make_mesh(ShardingConfig(), jax.devices()), default_rules(ShardingConfig())
    spec = abstract_model(config)
    shardings = tree_shardings(mesh, rules, spec.logical_axes, spec.params)
    abstract_params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), spec.params, shardings
    )
    step, params = loaded.params(step, abstract_params=abstract_params)
    bidirectional = data is not None and has_bidirectional_prefix(data.layout)
    return HeadModel(
        loaded, step, encode, min(length, most or length), bidirectional, spec.graphdef, params, mesh, rules
    )


@functools.partial(jax.jit, static_argnums=0)
def _head_outputs(model: HeadModel, params: PyTree, tokens_BxL: jax.Array, valid_BxL: jax.Array) -> jax.Array:
    with activation_context(model.mesh, model.rules):
        stack = "decoder" if model.config.encoder is None else "encoder"
        features = {f"{stack}_input_tokens": tokens_BxL, f"{stack}_segment_ids": valid_BxL}
        if model.bidirectional:
            features["decoder_causal_attention"] = valid_BxL
        scores, _ = cast(TaskModel, bind_params(model.graphdef, params)).scores(features)
        return jax.lax.with_sharding_constraint(scores, NamedSharding(model.mesh, PartitionSpec()))


def _softmax(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    x = scores.astype(np.float64)
    x = np.exp(x - x.max(-1, keepdims=True)) if x.size else x
    return x / x.sum(-1, keepdims=True)
