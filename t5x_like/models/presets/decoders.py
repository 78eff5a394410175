"""Presets of Decoders: Llama, Mistral, Mixtral, Qwen and GPT-2."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from t5x_like.config.model import ModelConfig, MoEConfig, RopeScalingConfig, StackConfig


def llama_3(size: Literal["1b", "3b", "8b", "70b"] = "1b") -> ModelConfig:
    """Return Llama 3.2 (1b, 3b) or 3.1 (8b, 70b), with rotary frequencies scaled for long sequences."""
    num_layers, d_model, d_ff, num_heads, head_dim, factor = {
        "1b": (16, 2048, 8192, 32, 64, 32.0),
        "3b": (28, 3072, 8192, 24, 128, 32.0),
        "8b": (32, 4096, 14336, 32, 128, 8.0),
        "70b": (80, 8192, 28672, 64, 128, 8.0),
    }[size]
    return ModelConfig(
        encoder=None,
        decoder=StackConfig(
            num_layers=num_layers,
            d_model=d_model,
            num_heads=num_heads,
            num_kv_heads=8,
            head_dim=head_dim,
            d_ff=d_ff,
            mlp_activation="silu",
            norm_epsilon=1e-5,
            positions="rope",
            rope_base=500_000.0,
            rope_scaling=RopeScalingConfig(kind="llama3", factor=factor),
        ),
        vocab_size=128_256,
        tie_embeddings=size in ("1b", "3b"),
        embedding_stddev=0.02,
        dtype="bfloat16",
        remat="dots",
    )


def decoder_1b() -> ModelConfig:
    """Return a causal decoder of the shape of Llama 3.2 1B, without scaling of rotary frequencies."""
    config = llama_3("1b")
    assert config.decoder is not None
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, rope_scaling=None))


def mixtral_8x7b() -> ModelConfig:
    """Return Mixtral 8x7B: each token is routed to two of eight experts."""
    return ModelConfig(
        encoder=None,
        decoder=StackConfig(
            num_layers=32,
            d_model=4096,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            d_ff=14336,
            mlp_activation="silu",
            norm_epsilon=1e-5,
            positions="rope",
            rope_base=1_000_000.0,
            experts=MoEConfig(num_experts=8, experts_per_token=2),
        ),
        vocab_size=32_000,
        embedding_stddev=0.02,
        dtype="bfloat16",
        remat="dots",
    )


def gpt_2(size: Literal["small", "medium", "large", "xl"] = "small") -> ModelConfig:
    """Return GPT-2: LayerNorm with biases, learned positions, tied embeddings."""
    num_layers, d_model = {"small": (12, 768), "medium": (24, 1024), "large": (36, 1280), "xl": (48, 1600)}[size]
    return ModelConfig(
        encoder=None,
        decoder=StackConfig(
            num_layers=num_layers,
            d_model=d_model,
            num_heads=d_model // 64,
            num_kv_heads=d_model // 64,
            head_dim=64,
            d_ff=4 * d_model,
            mlp_gated=False,
            norm="layernorm",
            norm_epsilon=1e-5,
            use_bias=True,
            positions="learned",
            max_positions=1024,
            dropout_rate=0.1,
        ),
        vocab_size=50_257,
        tie_embeddings=True,
        embedding_stddev=0.02,
    )


def mistral_7b(*, window: int | None = None) -> ModelConfig:
    """Return Mistral 7B; `window` is 4096 for version 0.1, which attends to so many tokens in all layers."""
    stack = StackConfig(
        num_layers=32,
        d_model=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        d_ff=14336,
        mlp_activation="silu",
        norm_epsilon=1e-5,
        positions="rope",
        rope_base=10_000.0 if window else 1_000_000.0,
        layer_pattern=("local",) if window else ("global",),
        sliding_window=(window - 1, window - 1) if window else None,
    )
    return ModelConfig(encoder=None, decoder=stack, vocab_size=32_000 if window else 32_768, **_LARGE)


def qwen_2_5(size: Literal["0.5b", "1.5b", "3b", "7b"] = "0.5b") -> ModelConfig:
    """Return Qwen 2.5: Llama's blocks with biases of queries, keys and values."""
    num_layers, d_model, d_ff, heads, vocab_size = {
        "0.5b": (24, 896, 4864, (14, 2), 151_936),
        "1.5b": (28, 1536, 8960, (12, 2), 151_936),
        "3b": (36, 2048, 11008, (16, 2), 151_936),
        "7b": (28, 3584, 18944, (28, 4), 152_064),
    }[size]
    stack = _qwen(num_layers, d_model, d_ff, heads, head_dim=d_model // heads[0])
    return ModelConfig(
        encoder=None,
        decoder=dataclasses.replace(stack, qkv_bias=True),
        vocab_size=vocab_size,
        tie_embeddings=size != "7b",
        **_LARGE,
    )


def qwen_3(size: Literal["0.6b", "1.7b", "4b", "8b"] = "0.6b") -> ModelConfig:
    """Return Qwen 3: Llama's blocks with normalized queries and keys, without biases."""
    num_layers, d_model, d_ff, num_heads = {
        "0.6b": (28, 1024, 3072, 16),
        "1.7b": (28, 2048, 6144, 16),
        "4b": (36, 2560, 9728, 32),
        "8b": (36, 4096, 12288, 32),
    }[size]
    stack = _qwen(num_layers, d_model, d_ff, (num_heads, 8), head_dim=128)
    return ModelConfig(
        encoder=None,
        decoder=dataclasses.replace(stack, qk_norm=True),
        vocab_size=151_936,
        tie_embeddings=size != "8b",
        **_LARGE,
    )


def _qwen(num_layers: int, d_model: int, d_ff: int, heads: tuple[int, int], *, head_dim: int) -> StackConfig:
    """Return a stack with what Qwen 2.5 and 3 share; `heads`: number of query heads and of key heads."""
    return StackConfig(
        num_layers=num_layers,
        d_model=d_model,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        d_ff=d_ff,
        mlp_activation="silu",
        positions="rope",
        rope_base=1_000_000.0,
    )


_LARGE: dict[str, Any] = {"embedding_stddev": 0.02, "dtype": "bfloat16", "remat": "dots"}
