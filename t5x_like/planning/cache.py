"""Bytes of the keys and values that a decoder keeps while it generates, as `Model.init_cache` allocates them."""

from __future__ import annotations

import dataclasses
from typing import Literal

from t5x_like.config.model import ModelConfig, StackConfig

CacheType = Literal["float32", "bfloat16", "int8"]

_SIZES = {"float32": 4, "bfloat16": 2, "int8": 1}
_SCALE = 4
"""Bytes of the scale that a slot of each head has beside int8 numbers."""
_INT32 = 4


@dataclasses.dataclass(frozen=True)
class CacheBytes:
    """Bytes over all layers, of one row.

    Attributes:
      per_token: For each token, in the layers that see everything. 2 x layers x key heads x head size x bytes.
      window: Of the local layers, whatever the row's length, as soon as it is longer than the window.
      per_source_token: For each token of the encoder, computed once; 0 without an encoder.
    """

    per_token: int
    window: int
    per_source_token: int


def cache_per_token(config: ModelConfig, dtype: CacheType | None = None) -> CacheBytes:
    """What a cache costs. `dtype` is that of keys and values; None is the model's.

    Raises:
      ValueError: the model has no decoder, hence no cache.
    """
    decoder = _decoder(config)
    slot = _slot_bytes(decoder, dtype or config.dtype)
    local = decoder.layer_kinds.count("local") if decoder.window is not None else 0
    return CacheBytes(
        per_token=(decoder.num_layers - local) * slot,
        window=0 if decoder.window is None else local * slot * (decoder.window[0] + 1),
        per_source_token=0 if config.encoder is None else decoder.num_layers * slot,
    )


def cache_bytes(
    config: ModelConfig,
    *,
    rows: int,
    length: int,
    encoder_length: int = 0,
    widest_step: int = 1,
    dtype: CacheType | None = None,
) -> int:
    """All bytes of a cache over all devices: keys and values, scales of int8, lengths, the encoder's padding.

    Args:
      rows: That are generated together.
      length: Tokens of a row, prompt and answer.
      encoder_length: Tokens of the encoder's input.
      widest_step: Tokens that are decoded at once: global layers have room for them behind the row, local ones behind
        their window.
      dtype: Of keys and values; None is the model's.
    """
    decoder = _decoder(config)
    slot = _slot_bytes(decoder, dtype or config.dtype)
    slots = 0
    for kind in decoder.layer_kinds:
        count = length + widest_step
        if kind == "local" and decoder.window is not None:
            count = min(count, decoder.window[0] + widest_step)
        slots += count
    total = rows * (slots * slot + _INT32)
    if config.encoder is not None:
        total += rows * encoder_length * (decoder.num_layers * slot + _INT32)
    return total


def _decoder(config: ModelConfig) -> StackConfig:
    if config.decoder is None:
        raise ValueError("an encoder alone generates nothing and keeps no keys and values")
    return config.decoder


def _slot_bytes(decoder: StackConfig, dtype: str) -> int:
    """Key and value of one token in one layer."""
    numbers = decoder.head_dim * _SIZES[dtype] + (_SCALE if dtype == "int8" else 0)
    return 2 * decoder.num_kv_heads * numbers
