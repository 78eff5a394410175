"""Presets of Gemma 1, 2 and 3, and the T5Gemmas, which are made of their blocks."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from t5x_like.config.model import ModelConfig, RopeScalingConfig, StackConfig


def _gemma(num_layers: int, d_model: int, d_ff: int, heads: tuple[int, int], *, head_dim: int = 256) -> StackConfig:
    """Return a stack with what all Gemmas share; `heads`: number of query heads and of key heads."""
    return StackConfig(
        num_layers=num_layers,
        d_model=d_model,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        d_ff=d_ff,
        norm_placement="both",
        norm_scale_plus_one=True,
        positions="rope",
    )


def _gemma_2(stack: StackConfig, *, attention_scale: float = 256**-0.5) -> StackConfig:
    return dataclasses.replace(
        stack,
        layer_pattern=("local", "global"),
        sliding_window=(4095, 4095),
        attention_softcap=50.0,
        attention_scale=attention_scale,
    )


def _gemma_3(stack: StackConfig, *, window: int = 1023, attention_scale: float = 256**-0.5) -> StackConfig:
    return dataclasses.replace(
        stack,
        layer_pattern=("local",) * 5 + ("global",),
        sliding_window=(window, window),
        rope_base=1_000_000.0,
        local_rope_base=10_000.0,
        qk_norm=True,
        attention_scale=attention_scale,
    )


_GEMMA_TABLES: dict[str, Any] = {
    "tie_embeddings": True,
    "scale_embeddings": True,
    "dtype": "bfloat16",
    "remat": "dots",
}
_GEMMA_2 = {
    "2b": _gemma_2(_gemma(26, 2304, 9216, (8, 4))),
    "9b": _gemma_2(_gemma(42, 3584, 14336, (16, 8))),
    "27b": _gemma_2(_gemma(46, 4608, 36864, (32, 16), head_dim=128), attention_scale=144**-0.5),
}
_GEMMA_3 = {
    "270m": _gemma_3(_gemma(18, 640, 2048, (4, 1)), window=511),
    "1b": _gemma_3(_gemma(26, 1152, 6912, (4, 1)), window=511),
    "4b": _gemma_3(_gemma(34, 2560, 10240, (8, 4))),
    "12b": _gemma_3(_gemma(48, 3840, 15360, (16, 8))),
    "27b": _gemma_3(_gemma(62, 5376, 21504, (32, 16), head_dim=128), attention_scale=168**-0.5),
}


def gemma_1(size: Literal["2b", "7b"] = "2b") -> ModelConfig:
    """Return Gemma 1: pre-norm only, all layers global."""
    stack = {
        "2b": _gemma(18, 2048, 16384, (8, 1)),
        "7b": _gemma(28, 3072, 24576, (16, 16)),
    }[size]
    stack = dataclasses.replace(stack, norm_placement="pre")
    return ModelConfig(
        encoder=None, decoder=stack, vocab_size=256_000, embedding_stddev=stack.d_model**-0.5, **_GEMMA_TABLES
    )


def gemma_2(size: Literal["2b", "9b", "27b"] = "2b") -> ModelConfig:
    """Return Gemma 2: norms before and after each branch, soft caps, every second layer local."""
    stack = _GEMMA_2[size]
    stddev = stack.d_model**-0.5
    return ModelConfig(
        encoder=None, decoder=stack, vocab_size=256_000, embedding_stddev=stddev, logits_softcap=30.0, **_GEMMA_TABLES
    )


def gemma_3(size: Literal["270m", "1b", "4b", "12b", "27b"] = "1b") -> ModelConfig:
    """Return Gemma 3 for text: normalized queries and keys in place of soft caps, five of six layers local.

    Local layers have their own rotary base.
    """
    stack = _GEMMA_3[size]
    large = size not in ("270m", "1b")
    if large:
        stack = dataclasses.replace(stack, rope_scaling=RopeScalingConfig(kind="linear", factor=8.0))
    return ModelConfig(
        encoder=None,
        decoder=stack,
        vocab_size=262_208 if large else 262_144,
        embedding_stddev=stack.d_model**-0.5,
        **_GEMMA_TABLES,
    )


def t5gemma(size: Literal["2b-2b", "9b-2b", "9b-9b"] = "2b-2b") -> ModelConfig:
    """Return T5Gemma: two stacks of Gemma 2 blocks, which may differ in size, each with its own token table.

    The encoder's window is that of transformers 5; version 4 used one token less.
    """
    encoder, decoder = (_GEMMA_2[name] for name in size.split("-"))
    return ModelConfig(
        encoder=dataclasses.replace(encoder, sliding_window=(4096, 4096)),
        decoder=decoder,
        vocab_size=256_000,
        separate_encoder_embeddings=True,
        **_GEMMA_TABLES,
        embedding_stddev=decoder.d_model**-0.5,
        logits_softcap=30.0,
    )


def t5gemma_2(size: Literal["270m-270m", "1b-1b", "4b-4b"] = "270m-270m") -> ModelConfig:
    """Return T5Gemma 2 for text: Gemma 3 blocks, merged self- and cross-attention, one token table for both stacks.

    The window of the encoder has the size of the decoder's but is centered on the token.
    """
    stack = dataclasses.replace(
        _GEMMA_3[size.split("-")[0]],
        rope_scaling=RopeScalingConfig(kind="linear", factor=8.0),
        cross_attention="merged",
    )
    assert stack.sliding_window is not None
    width = stack.sliding_window[0] + 1
    return ModelConfig(
        encoder=dataclasses.replace(
            stack, sliding_window=((width + 1) // 2 - 1, width // 2), cross_attention="separate"
        ),
        decoder=stack,
        vocab_size=262_144,
        unscaled_embedding_token_id=256_000,
        **_GEMMA_TABLES,
        embedding_stddev=stack.d_model**-0.5,
    )
