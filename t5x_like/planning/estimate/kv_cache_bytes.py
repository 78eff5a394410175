"""Bytes of the KV cache of a decoder during generation, as `Model.init_cache` allocates it."""

from __future__ import annotations

import dataclasses
from typing import Literal

from t5x_like.config.model import ModelConfig, StackConfig

CacheType = Literal["float32", "bfloat16", "int8"]

ITEM_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "int8": 1}
_SCALE = 4
"""Bytes of the scale that each head stores per cached token beside int8 numbers."""
_INT32 = 4


@dataclasses.dataclass(frozen=True)
class CacheBytes:
    """Bytes of one row over all layers.

    Attributes:
      per_token: Bytes per token in the layers with global attention: 2 x layers x key heads x head size x item size.
      window: Bytes in the layers with local attention, for any row that is longer than the window.
      per_source_token: Bytes per encoder token, computed once; 0 without an encoder.
    """

    per_token: int
    window: int
    per_source_token: int


def cache_per_token(config: ModelConfig, dtype: CacheType | None = None) -> CacheBytes:
    """Return the size of a cache per row and token. `dtype` is that of keys and values; None means the model's.

    Raises:
      ValueError: The model has no decoder and hence no cache.
    """
    decoder = _decoder(config)
    slot = _slot_bytes(decoder, dtype or config.dtype)
    local = decoder.layer_kinds.count("local") if decoder.sliding_window is not None else 0
    return CacheBytes(
        per_token=(decoder.num_layers - local) * slot,
        window=0 if decoder.sliding_window is None else local * slot * (decoder.sliding_window[0] + 1),
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
    """Return all bytes of a cache over all devices: keys and values, int8 scales, lengths, the encoder's padding mask.

    Args:
      rows: Number of rows that are generated together.
      length: Tokens of a row, prompt and answer together.
      encoder_length: Tokens of the encoder's input.
      widest_step: Largest number of tokens decoded in one step. Global layers have space for them after the row, local
        layers after their window.
      dtype: Type of keys and values; None means the model's.
    """
    decoder = _decoder(config)
    slot = _slot_bytes(decoder, dtype or config.dtype)
    slots = 0
    for kind in decoder.layer_kinds:
        count = length + widest_step
        if kind == "local" and decoder.sliding_window is not None:
            count = min(count, decoder.sliding_window[0] + widest_step)
        slots += count
    total = rows * (slots * slot + _INT32)
    if config.encoder is not None:
        total += rows * encoder_length * (decoder.num_layers * slot + _INT32)
    return total


def attended_tokens(decoder: StackConfig, length: int) -> int:
    """Return the cached tokens of a row that a new token attends to, itself among them, summed over the layers.

    Args:
      length: Tokens of the row, the new one included.
    """
    window = length if decoder.sliding_window is None else decoder.sliding_window[0] + 1
    return sum(min(length, window) if kind == "local" else length for kind in decoder.layer_kinds)


def attended_bytes(
    config: ModelConfig, *, rows: int, length: int, encoder_length: int = 0, dtype: CacheType | None = None
) -> int:
    """Return the bytes of keys and values that a decoding step must read: those that its tokens attend to.

    Args:
      rows: Number of rows, of one token each.
      length: Tokens of a row, the new one included.
      encoder_length: Tokens of the encoder's input.
      dtype: Type of keys and values; None means the model's.
    """
    decoder = _decoder(config)
    source = 0 if config.encoder is None else decoder.num_layers * encoder_length
    return rows * (attended_tokens(decoder, length) + source) * _slot_bytes(decoder, dtype or config.dtype)


def _decoder(config: ModelConfig) -> StackConfig:
    if config.decoder is None:
        raise ValueError("found a model without a decoder, expected a decoder: an encoder has no KV cache")
    return config.decoder


def _slot_bytes(decoder: StackConfig, dtype: str) -> int:
    """Return the bytes of the key and value of one token in one layer."""
    numbers = decoder.head_dim * ITEM_BYTES[dtype] + (_SCALE if dtype == "int8" else 0)
    return 2 * decoder.num_kv_heads * numbers
