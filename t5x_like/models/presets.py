"""The families as configurations of the one model. Nothing below this file knows a family's name."""

from __future__ import annotations

import dataclasses
from typing import Literal

from t5x_like.config.model import ModelConfig, StackConfig

T5Size = Literal["small", "base", "large", "xl", "xxl"]
ElectraSize = Literal["small", "base", "large"]
SmokeModel = Literal["encoder_decoder", "decoder", "prefix_lm", "encoder", "electra"]

T5_VOCABULARY = 32_128
"""32,000 pieces and 100 sentinels, rounded up to a multiple of 128."""


def t5_1_1(size: T5Size = "base", *, vocab_size: int = T5_VOCABULARY, dropout_rate: float = 0.0) -> ModelConfig:
    """T5 1.1 (and Flan-T5): gated GELU, separate head. Pre-training has no dropout, fine-tuning 0.1.

    The head starts at d_model**-0.5 where T5's code has 1.0, so that training starts near ln(vocabulary).
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
    """T5 1.0: ReLU, the token table is the head, whose input is scaled by d_model**-0.5."""
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
    """UL2 20B (and Flan-UL2): gated SiLU, separate head."""
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


def mt5_base() -> ModelConfig:
    """mT5 base: T5 1.1 base with a multilingual vocabulary."""
    return t5_1_1("base", vocab_size=250_112)


def decoder_1b() -> ModelConfig:
    """A causal decoder in the shape of Llama 3.2 1B (which also scales its rotary frequencies for long context)."""
    return ModelConfig(
        encoder=None,
        decoder=StackConfig(
            num_layers=16,
            d_model=2048,
            num_heads=32,
            num_kv_heads=8,
            head_dim=64,
            d_ff=8192,
            mlp_activation="silu",
            norm_epsilon=1e-5,
            positions="rope",
            rope_base=500_000.0,
        ),
        vocab_size=128_256,
        tie_embeddings=True,
        embedding_stddev=0.02,
        dtype="bfloat16",
        remat="dots",
    )


def bert_base() -> ModelConfig:
    """BERT base with its masked-LM head; one kind of segment, whose vector belongs to the position table."""
    return ModelConfig(
        encoder=StackConfig(
            num_layers=12,
            d_model=768,
            num_heads=12,
            num_kv_heads=12,
            head_dim=64,
            d_ff=3072,
            mlp_activation="gelu",
            mlp_gated=False,
            norm="layernorm",
            norm_placement="post",
            norm_epsilon=1e-12,
            use_bias=True,
            positions="learned",
            max_positions=512,
            dropout_rate=0.1,
        ),
        decoder=None,
        vocab_size=30_522,
        tie_embeddings=True,
        embedding_stddev=0.02,
        embedding_norm=True,
        head_transform=True,
        head_bias=True,
    )


def electra(size: ElectraSize = "small", *, generator_fraction: float | None = None) -> ModelConfig:
    """ELECTRA's discriminator and generator, both BERTs of one vocabulary; one kind of segment, as in `bert_base`.

    Args:
      size: Small has embeddings of half its width.
      generator_fraction: Width of the generator in that of the discriminator; so are its heads and MLP. None: as in the
        paper's Table 6, a quarter, a third for base. (The released small generator is as large as its discriminator.)
    """
    d_model, num_layers, num_heads, default = {
        "small": (256, 12, 4, 1 / 4),
        "base": (768, 12, 12, 1 / 3),
        "large": (1024, 24, 16, 1 / 4),
    }[size]
    bert = bert_base()
    base = bert.encoder
    assert base is not None

    def stack(fraction: float) -> StackConfig:
        width, heads = round(fraction * d_model), max(1, round(fraction * num_heads))
        return dataclasses.replace(
            base,
            num_layers=num_layers,
            d_model=width,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=width // heads,
            d_ff=4 * width,
        )

    return dataclasses.replace(
        bert,
        encoder=stack(1),
        generator=stack(generator_fraction or default),
        embedding_width=128 if size == "small" else None,
    )


def smoke(model: SmokeModel = "encoder_decoder", *, vocab_size: int = 4352) -> ModelConfig:
    """A model that learns something in minutes on two CPU cores, in each architecture; `electra` is the encoder with a
    generator half as wide.

    `decoder` and `prefix_lm` are the same stack: rotary positions hold to both sides, and what a query sees comes with
    the batch.
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
        head_transform=model == "electra",
        generator=dataclasses.replace(stack, d_model=64, num_heads=2, num_kv_heads=2, d_ff=192)
        if model == "electra"
        else None,
    )


def _t5(stack: StackConfig, vocab_size: int, *, tied: bool = False) -> ModelConfig:
    """What all T5s share: the same shape for both stacks, relative bias, no factor on the scores, no biases."""
    encoder = dataclasses.replace(stack, positions="relative_bias", attention_scale=1.0, dropout_broadcast_length=True)
    return ModelConfig(
        encoder=encoder,
        decoder=dataclasses.replace(encoder, relative_bias_bidirectional=False),
        vocab_size=vocab_size,
        tie_embeddings=tied,
        scale_logits=tied,
    )
