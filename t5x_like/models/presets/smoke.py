"""Presets of Small models for smoke tests."""

from __future__ import annotations

import dataclasses
from typing import Literal

from t5x_like.config.model import ModelConfig, StackConfig

SmokeModel = Literal["encoder_decoder", "decoder", "prefix_lm", "encoder", "electra"]


def smoke(model: SmokeModel = "encoder_decoder", *, vocab_size: int = 4352) -> ModelConfig:
    """Return a small model of each architecture that learns something in minutes on two CPU cores.

    `electra` is the encoder with a generator of half its width. `decoder` and `prefix_lm` are the same stack: rotary
    positions work in both directions, and the batch decides what a query attends to.
    """
    d_model = 128
    stack = StackConfig(
        num_layers=3,
        d_model=d_model,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        d_ff=384,
        positions="rope",
    )
    return ModelConfig(
        encoder=stack if model in ("encoder_decoder", "encoder", "electra") else None,
        decoder=None if model in ("encoder", "electra") else stack,
        vocab_size=vocab_size,
        tie_embeddings=True,
        embedding_stddev=d_model**-0.5,
        lm_head_transform=model == "electra",
        generator=dataclasses.replace(stack, d_model=64, num_heads=2, num_kv_heads=2, d_ff=192)
        if model == "electra"
        else None,
    )
