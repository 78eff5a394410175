"""Presets of T5: 1.0, 1.1, UL2, mT5, umT5, LongT5 and Switch Transformers."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from t5x_like.config.model import ModelConfig, MoEConfig, StackConfig

T5Size = Literal["small", "base", "large", "xl", "xxl"]
T5_VOCABULARY = 32_128
"""32,000 pieces and 100 sentinels, rounded up to a multiple of 128."""


def t5_1_1(size: T5Size = "base", *, vocab_size: int = T5_VOCABULARY, dropout_rate: float = 0.0) -> ModelConfig:
    """Return T5 1.1 (and Flan-T5): gated GELU, separate head. Pre-training uses no dropout, fine-tuning 0.1.

    The head is initialized with d_model**-0.5 and not with 1.0 as in T5's code, so that the loss starts near
    ln(vocabulary).
    """
    d_model, d_ff, num_heads, num_layers = {
        "small": (512, 1024, 6, 8),
        "base": (768, 2048, 12, 12),
        "large": (1024, 2816, 16, 24),
        "xl": (2048, 5120, 32, 24),
        "xxl": (4096, 10240, 64, 24),
    }[size]
    return _t5(
        StackConfig(
            num_layers=num_layers,
            d_model=d_model,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=64,
            d_ff=d_ff,
            mlp_activation="gelu_tanh",
            dropout_rate=dropout_rate,
        ),
        vocab_size,
    )


def t5_1_0(size: T5Size = "base", *, vocab_size: int = T5_VOCABULARY, dropout_rate: float = 0.1) -> ModelConfig:
    """Return T5 1.0: ReLU, and tied embeddings with the head's input scaled by d_model**-0.5."""
    d_model, d_ff, num_heads, num_layers, head_dim = {
        "small": (512, 2048, 8, 6, 64),
        "base": (768, 3072, 12, 12, 64),
        "large": (1024, 4096, 16, 24, 64),
        "xl": (1024, 16384, 32, 24, 128),
        "xxl": (1024, 65536, 128, 24, 128),
    }[size]
    return _t5(
        StackConfig(
            num_layers=num_layers,
            d_model=d_model,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            d_ff=d_ff,
            mlp_activation="relu",
            mlp_gated=False,
            dropout_rate=dropout_rate,
        ),
        vocab_size,
        tied=True,
    )


def ul2_20b() -> ModelConfig:
    """Return UL2 20B (and Flan-UL2): gated SiLU, separate head."""
    return _t5(
        StackConfig(
            num_layers=32,
            d_model=4096,
            num_heads=16,
            num_kv_heads=16,
            head_dim=256,
            d_ff=16384,
            mlp_activation="silu",
        ),
        T5_VOCABULARY,
    )


def mt5(size: T5Size = "base") -> ModelConfig:
    """Return mT5: T5 1.1 with a multilingual vocabulary."""
    return t5_1_1(size, vocab_size=250_112)


def mt5_base() -> ModelConfig:
    """Return mT5 base."""
    return mt5("base")


def byt5(size: T5Size = "base") -> ModelConfig:
    """Return ByT5: mT5 over bytes, with three times as many encoder as decoder layers."""
    d_model, d_ff, num_heads, num_layers = {
        "small": (1472, 3584, 6, 12),
        "base": (1536, 3968, 12, 18),
        "large": (1536, 3840, 16, 36),
        "xl": (2560, 6720, 32, 36),
        "xxl": (4672, 12352, 64, 36),
    }[size]
    stack = StackConfig(
        num_layers=num_layers, d_model=d_model, num_heads=num_heads, num_kv_heads=num_heads, head_dim=64, d_ff=d_ff
    )
    model = _t5(stack, 384)
    assert model.decoder is not None
    return dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, num_layers=num_layers // 3))


def umt5(size: T5Size = "base", *, scale_logits: bool = False) -> ModelConfig:
    """Return umT5: mT5 with a table of relative bias in each layer and another vocabulary.

    Args:
      size: Size of the model.
      scale_logits: Scale the logits as transformers 5 does although the head is separate; T5X and transformers 4 do
        not.
    """
    config = t5_1_1(size, vocab_size=256_384)
    assert config.encoder is not None and config.decoder is not None
    return dataclasses.replace(
        config,
        encoder=dataclasses.replace(config.encoder, relative_bias_per_layer=True),
        decoder=dataclasses.replace(config.decoder, relative_bias_per_layer=True),
        scale_logits=scale_logits,
    )


def _t5(stack: StackConfig, vocab_size: int, *, tied: bool = False) -> ModelConfig:
    """Return a T5: both stacks of the same shape, relative bias, unscaled attention scores, no biases."""
    encoder = dataclasses.replace(stack, positions="relative_bias", attention_scale=1.0, dropout_broadcast_length=True)
    return ModelConfig(
        encoder=encoder,
        decoder=dataclasses.replace(encoder, relative_bias_bidirectional=False),
        vocab_size=vocab_size,
        tie_embeddings=tied,
        scale_logits=tied,
    )


def t5_encoder(size: T5Size = "base", *, vocab_size: int = T5_VOCABULARY, bias_per_layer: bool = False) -> ModelConfig:
    """Return the encoder of T5 1.1 alone, as sentence-T5 and image models use it; `bias_per_layer`: that of umT5."""
    model = t5_1_1(size, vocab_size=vocab_size)
    assert model.encoder is not None
    encoder = dataclasses.replace(model.encoder, relative_bias_per_layer=bias_per_layer)
    return dataclasses.replace(model, encoder=encoder, decoder=None, tie_embeddings=True)


def switch(size: Literal["base", "large"] = "base", *, num_experts: int = 8) -> ModelConfig:
    """Return a Switch Transformer: T5 1.0 with experts in every second layer, of which each token takes one."""
    model = t5_1_0(size, dropout_rate=0.0)
    experts = MoEConfig(
        num_experts=num_experts,
        experts_per_token=1,
        layer_period=2,
        capacity=64,
        normalize_weights=False,
        router_z_loss_weight=0.001,
    )
    stacks: dict[str, Any] = {name: dataclasses.replace(stack, experts=experts) for name, stack in model.stacks.items()}
    return dataclasses.replace(model, **stacks)


def long_t5(size: T5Size = "base", *, local_radius: int = 127, block_size: int | None = None) -> ModelConfig:
    """Return LongT5: T5 1.1 whose encoder attends to `local_radius` tokens on each side.

    With a `block_size`, 16 in the published models, it has transient global attention.
    """
    model = t5_1_1(size)
    assert model.encoder is not None
    window = (local_radius, local_radius)
    encoder = dataclasses.replace(
        model.encoder, layer_pattern=("local",), sliding_window=window, global_block_size=block_size
    )
    return dataclasses.replace(model, encoder=encoder)
