"""Presets of BART and mBART."""

from __future__ import annotations

import dataclasses
from typing import Literal

from t5x_like.config.model import ModelConfig, StackConfig


def bart(size: Literal["base", "large"] = "base") -> ModelConfig:
    """Return BART: post-norm stacks with learned positions and biases, one tied table."""
    num_layers, d_model, num_heads = {"base": (6, 768, 12), "large": (12, 1024, 16)}[size]
    stack = StackConfig(
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=64,
        d_ff=4 * d_model,
        mlp_activation="gelu",
        mlp_gated=False,
        norm="layernorm",
        norm_placement="post",
        norm_epsilon=1e-5,
        use_bias=True,
        positions="learned",
        max_positions=1024,
        position_offset=2,
        dropout_rate=0.1,
    )
    return ModelConfig(
        encoder=stack,
        decoder=stack,
        vocab_size=50_265,
        pad_token_id=1,
        decoder_start_token_id=2,
        eos_ids=(2,),
        tie_embeddings=True,
        embedding_stddev=0.02,
        embedding_norm=True,
        head_bias=True,
    )


def mbart() -> ModelConfig:
    """Return mBART: pre-norm, scaled embeddings, a multilingual vocabulary with one start token per language."""
    model = bart("large")
    assert model.encoder is not None
    stack = dataclasses.replace(model.encoder, norm_placement="pre")
    return dataclasses.replace(model, encoder=stack, decoder=stack, vocab_size=250_027, scale_embeddings=True)
