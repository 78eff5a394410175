"""Exported functions of a model: functions of flat weights and plain arrays, traced with symbolic batch sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, export

from t5x_like.config.model import ModelConfig
from t5x_like.decoding.bucketing import check_positions
from t5x_like.decoding.decode_loop import read_prompts
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.export.quantization import unpacked
from t5x_like.kernels.attention import backend_names, get_backend
from t5x_like.models.factory import abstract_model, bind_params
from t5x_like.models.model import Model
from t5x_like.models.task_heads import TaskModel

Platform = Literal["cpu", "cuda", "tpu"]
PLATFORMS: tuple[Platform, ...] = ("cpu", "cuda", "tpu")
Weights = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Lengths that are fixed in the exported functions. The number of rows is symbolic.

    Attributes:
      prompt: Tokens of the longest prompt (or text to encode); shorter rows are padded on the right.
      new: Number of tokens that can be decoded after the prompt.
    """

    prompt: int
    new: int


def exported_functions(
    config: ModelConfig,
    weights: Weights,
    lengths: Lengths,
    *,
    bidirectional: bool = False,
    platforms: Sequence[Platform] = PLATFORMS,
) -> dict[str, export.Exported]:
    """Return StableHLO of each function of the model, for any number of rows B.

    encode: (weights, tokens int32 [B, P], lengths int32 [B]) -> states [B, P, d].
    predict: only for encoders: (weights, tokens, lengths) -> logits, float32 [B, P, V], or the outputs of the task head
      (`TaskModel.scores`).
    prefill: (weights, tokens int32 [B, P], lengths int32 [B]) -> {"logits": float32 [B, V], "cache": list of arrays}.
      The tokens are the encoder's inputs; without an encoder, the beginning of the stream with the start token first.
    decode: (weights, cache, tokens int32 [B]) -> the same as prefill, after one more token per row.

    Args:
      weights: Weights by path, plain or from `quantized`; only shapes and types are read.
      bidirectional: Tokens of a decoder's prompt attend to each other in both directions (prefix-LM).

    Raises:
      ConfigError: the lengths do not fit the model's table of positions, or its attention backend is not portable.
    """
    check_positions(config, lengths.prompt, lengths.new)
    if not get_backend(config.attention).is_portable:
        portable = [name for name in backend_names() if get_backend(name).is_portable]
        expected = f"a backend that runs on every platform: {', '.join(portable)}"
        raise ConfigError([ConfigProblem("model.attention", config.attention, expected)])
    graphdef = abstract_model(config).graphdef

    def model(weights: Weights) -> Model:
        return bind_params(graphdef, unpacked(weights, jnp.dtype(config.dtype)))

    rows = export.symbolic_shape("b")[0]
    of_weights = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in weights.items()}
    tokens = jax.ShapeDtypeStruct((rows, lengths.prompt), jnp.int32)
    row = jax.ShapeDtypeStruct((rows,), jnp.int32)
    found: dict[str, export.Exported] = {}

    def add(name: str, function: Callable[..., Any], *arguments: Any) -> None:
        found[name] = export.export(jax.jit(function), platforms=platforms)(of_weights, *arguments)

    if config.encoder is not None:
        add("encode", lambda weights, tokens, length: _encode(model(weights), tokens, length), tokens, row)
    if config.decoder is None:
        add("predict", lambda weights, tokens, length: _predict(model(weights), tokens, length), tokens, row)
        return found

    def read(weights: Weights, tokens: Array, length: Array) -> tuple[Array, Any]:
        return read_prompts(model(weights), tokens, length, lengths.new, bidirectional=bidirectional)

    def begin(weights: Weights, tokens: Array, length: Array) -> dict[str, Any]:
        logits, cache = read(weights, tokens, length)
        return {"logits": logits, "cache": jax.tree.leaves(cache)}

    cache = jax.eval_shape(read, of_weights, tokens, row)[1]
    structure = jax.tree.structure(cache)

    def decode(weights: Weights, leaves: list[Array], tokens_B: Array) -> dict[str, Any]:
        logits, after = model(weights).decode(tokens_B[:, None], jax.tree.unflatten(structure, leaves))
        return {"logits": logits[:, 0], "cache": jax.tree.leaves(after)}

    add("prefill", begin, tokens, row)
    add("decode", decode, jax.tree.leaves(cache), row)
    return found


def _encode(model: Model, tokens_BxP: Array, lengths_B: Array) -> Array:
    return model.encode(tokens_BxP, segment_ids=_valid(tokens_BxP, lengths_B))


def _predict(model: Model, tokens_BxP: Array, lengths_B: Array) -> Array:
    batch = {"encoder_input_tokens": tokens_BxP, "encoder_segment_ids": _valid(tokens_BxP, lengths_B)}
    return model.scores(batch)[0] if isinstance(model, TaskModel) else model(batch)


def _valid(tokens_BxP: Array, lengths_B: Array) -> Array:
    return (jnp.arange(tokens_BxP.shape[1]) < lengths_B[:, None]).astype(jnp.int32)
