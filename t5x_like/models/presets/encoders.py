"""Presets of encoders: BERT, RoBERTa, ELECTRA, ModernBERT, DeBERTa, EuroBERT and NeoBERT."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from t5x_like.config.model import ModelConfig, StackConfig, TaskHeadConfig

ElectraSize = Literal["small", "base", "large"]
_MASKED_LM: dict[str, Any] = {
    "tie_embeddings": True,
    "embedding_stddev": 0.02,
    "embedding_norm": True,
    "lm_head_transform": True,
    "head_bias": True,
}


def bert(size: Literal["base", "large"] = "base", *, num_token_types: int = 2) -> ModelConfig:
    """Return BERT with its masked-LM head; the batch gives the segment type of each token."""
    num_layers, d_model = {"base": (12, 768), "large": (24, 1024)}[size]
    return ModelConfig(
        encoder=StackConfig(
            num_layers=num_layers,
            d_model=d_model,
            num_heads=d_model // 64,
            num_kv_heads=d_model // 64,
            head_dim=64,
            d_ff=4 * d_model,
            mlp_activation="gelu",
            mlp_gated=False,
            norm="layernorm",
            norm_placement="post",
            norm_epsilon=1e-12,
            use_bias=True,
            positions="learned",
            max_positions=512,
            num_token_types=num_token_types,
            dropout_rate=0.1,
        ),
        decoder=None,
        vocab_size=30_522,
        **_MASKED_LM,
    )


def bert_base() -> ModelConfig:
    """Return BERT base with one segment type, whose vector is part of the position table."""
    return bert("base", num_token_types=0)


def electra(size: ElectraSize = "small", *, generator_fraction: float | None = None) -> ModelConfig:
    """Return ELECTRA: discriminator and generator, two BERTs with one vocabulary and one segment type, as in
    `bert_base`.

    Args:
      size: Size of the discriminator. "small" has embeddings of half its width.
      generator_fraction: Width of the generator as a fraction of the discriminator's, which also applies to its heads
        and MLP. None: the fraction of the paper's Table 6, one quarter, or one third for base. (The released small
        generator is as large as its discriminator.)
    """
    d_model, num_layers, num_heads, default = {
        "small": (256, 12, 4, 1 / 4),
        "base": (768, 12, 12, 1 / 3),
        "large": (1024, 24, 16, 1 / 4),
    }[size]
    bert_model = bert_base()
    base = bert_model.encoder
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
        bert_model,
        encoder=stack(1),
        generator=stack(generator_fraction or default),
        embedding_dim=128 if size == "small" else None,
    )


def modernbert(size: Literal["base", "large"] = "base") -> ModelConfig:
    """Return ModernBERT: pre-norm without biases, gated MLP, rotary positions, two of three layers local.

    Its own tokenizer pads with id 50283 and not with the preset's `pad_token_id`: give the model segment ids, or set
    it.
    """
    num_layers, d_model, d_ff = {"base": (22, 768, 1152), "large": (28, 1024, 2624)}[size]
    return ModelConfig(
        encoder=StackConfig(
            num_layers=num_layers,
            d_model=d_model,
            num_heads=d_model // 64,
            num_kv_heads=d_model // 64,
            head_dim=64,
            d_ff=d_ff,
            mlp_activation="gelu",
            norm="layernorm",
            norm_epsilon=1e-5,
            first_layer_attention_norm=False,
            positions="rope",
            rope_base=160_000.0,
            layer_pattern=("global", "local", "local"),
            sliding_window=(64, 64),
            local_rope_base=10_000.0,
        ),
        decoder=None,
        vocab_size=50_368,
        **_MASKED_LM,
    )


def deberta_v3(size: Literal["small", "base", "large"] = "base") -> ModelConfig:
    """Return DeBERTa-v3: BERT's blocks with disentangled attention in place of position embeddings."""
    num_layers, d_model = {"small": (6, 768), "base": (12, 768), "large": (24, 1024)}[size]
    return ModelConfig(
        encoder=StackConfig(
            num_layers=num_layers,
            d_model=d_model,
            num_heads=d_model // 64,
            num_kv_heads=d_model // 64,
            head_dim=64,
            d_ff=4 * d_model,
            mlp_activation="gelu",
            mlp_gated=False,
            norm="layernorm",
            norm_placement="post",
            norm_epsilon=1e-7,
            use_bias=True,
            positions="disentangled",
            relative_bias_buckets=256,
            relative_bias_max_distance=512,
            attention_scale=(3 * 64) ** -0.5,
            dropout_rate=0.1,
        ),
        decoder=None,
        vocab_size=128_100,
        **_MASKED_LM,
    )


def roberta(size: Literal["base", "large"] = "base") -> ModelConfig:
    """Return RoBERTa: BERT with one segment type, another vocabulary, and positions from row 2 of the table on."""
    model = bert(size, num_token_types=1)
    assert model.encoder is not None
    stack = dataclasses.replace(model.encoder, position_offset=2, norm_epsilon=1e-5)
    return dataclasses.replace(model, encoder=stack, vocab_size=50_265, pad_token_id=1)


def xlm_roberta(size: Literal["base", "large"] = "base") -> ModelConfig:
    """Return XLM-R: RoBERTa with a multilingual vocabulary."""
    return dataclasses.replace(roberta(size), vocab_size=250_002)


DISCRIMINATOR_STATES = TaskHeadConfig(kind="embedding", pooling="cls", normalize=False)
"""Head without parameters for a discriminator whose states are wider than its embeddings."""


def electra_encoder(size: ElectraSize = "small") -> ModelConfig:
    """Return ELECTRA's discriminator after training, as an encoder with two segment types."""
    model = electra(size)
    assert model.encoder is not None
    return dataclasses.replace(
        model,
        generator=None,
        encoder=dataclasses.replace(model.encoder, num_token_types=2),
        lm_head_transform=False,
        head_bias=False,
        task_head=None if model.embedding_dim is None else DISCRIMINATOR_STATES,
    )


def eurobert(size: Literal["210m", "610m", "2.1b"] = "210m") -> ModelConfig:
    """Return EuroBERT: Llama's blocks, attending in both directions."""
    num_layers, d_model, d_ff, num_heads, num_kv_heads = {
        "210m": (12, 768, 3072, 12, 12),
        "610m": (26, 1152, 4096, 18, 6),
        "2.1b": (32, 2304, 6144, 18, 6),
    }[size]
    return ModelConfig(
        encoder=StackConfig(
            num_layers=num_layers,
            d_model=d_model,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=d_model // num_heads,
            d_ff=d_ff,
            mlp_activation="silu",
            norm_epsilon=1e-5,
            positions="rope",
            rope_base=250_000.0,
        ),
        decoder=None,
        vocab_size=128_256,
        pad_token_id=128_001,
        embedding_stddev=0.02,
    )


def modernbert_decoder(size: Literal["base", "large"] = "base") -> ModelConfig:
    """Return the decoder of ModernBERT's build, as in Ettin: windows of 64 tokens, a head with a transform."""
    model = modernbert(size)
    assert model.encoder is not None
    stack = dataclasses.replace(model.encoder, sliding_window=(63, 63))
    return dataclasses.replace(model, encoder=None, decoder=stack)


def neobert() -> ModelConfig:
    """Return NeoBERT (Le Breton et al. 2025): Llama's blocks, attending in both directions, and an untied head with a
    bias."""
    return ModelConfig(
        encoder=StackConfig(
            num_layers=28,
            d_model=768,
            num_heads=12,
            num_kv_heads=12,
            head_dim=64,
            d_ff=2048,
            mlp_activation="silu",
            norm_epsilon=1e-5,
            positions="rope",
        ),
        decoder=None,
        vocab_size=30_522,
        embedding_stddev=0.02,
        head_bias=True,
    )
