"""The families as configurations of the one model. Nothing below this file knows a family's name."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from t5x_like.config.model import Experts, ModelConfig, RopeScaling, StackConfig

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


def mt5(size: T5Size = "base") -> ModelConfig:
    """mT5: T5 1.1 with a multilingual vocabulary."""
    return t5_1_1(size, vocab_size=250_112)


def mt5_base() -> ModelConfig:
    return mt5("base")


def umt5(size: T5Size = "base", *, scale_logits: bool = False) -> ModelConfig:
    """umT5: mT5 with a table of relative bias in each layer and its own vocabulary.

    `scale_logits`: transformers 5 scales the logits although the head is separate; T5X and transformers 4 do not.
    """
    config = t5_1_1(size, vocab_size=256_384)
    assert config.encoder is not None and config.decoder is not None
    return dataclasses.replace(
        config,
        encoder=dataclasses.replace(config.encoder, relative_bias_per_layer=True),
        decoder=dataclasses.replace(config.decoder, relative_bias_per_layer=True),
        scale_logits=scale_logits,
    )


def t5gemma(size: Literal["2b-2b", "9b-2b", "9b-9b"] = "2b-2b") -> ModelConfig:
    """T5Gemma: a stack of Gemma 2 blocks beside another, of other size perhaps, each with a table of its own. The
    encoder's window is that of transformers 5; version 4 had one cell less."""
    encoder, decoder = (_GEMMA_2[name] for name in size.split("-"))
    return ModelConfig(
        encoder=dataclasses.replace(encoder, window=(4096, 4096)),
        decoder=decoder,
        vocab_size=256_000,
        separate_encoder_embeddings=True,
        **_GEMMA_TABLES,
        embedding_stddev=decoder.d_model**-0.5,
        logits_softcap=30.0,
    )


def t5gemma_2(size: Literal["270m-270m", "1b-1b", "4b-4b"] = "270m-270m") -> ModelConfig:
    """T5Gemma 2, text: Gemma 3 blocks, attention merged over decoder and encoder, one token table for all. The encoder
    sees a window of the decoder's size around a token."""
    stack = dataclasses.replace(
        _GEMMA_3[size.split("-")[0]], rope_scaling=RopeScaling(kind="linear", factor=8.0), cross_attention="merged"
    )
    assert stack.window is not None
    width = stack.window[0] + 1
    return ModelConfig(
        encoder=dataclasses.replace(stack, window=((width + 1) // 2 - 1, width // 2), cross_attention="separate"),
        decoder=stack,
        vocab_size=262_144,
        unscaled_token=256_000,
        **_GEMMA_TABLES,
        embedding_stddev=stack.d_model**-0.5,
    )


def gemma_2(size: Literal["2b", "9b", "27b"] = "2b") -> ModelConfig:
    """Gemma 2: norms before and after each branch, softcaps, every second layer local."""
    stack = _GEMMA_2[size]
    stddev = stack.d_model**-0.5
    return ModelConfig(
        encoder=None, decoder=stack, vocab_size=256_000, embedding_stddev=stddev, logits_softcap=30.0, **_GEMMA_TABLES
    )


def gemma_3(size: Literal["270m", "1b", "4b", "12b", "27b"] = "1b") -> ModelConfig:
    """Gemma 3, text: normalised queries and keys for softcaps, five of six layers local with their own rotary base."""
    stack = _GEMMA_3[size]
    large = size not in ("270m", "1b")
    if large:
        stack = dataclasses.replace(stack, rope_scaling=RopeScaling(kind="linear", factor=8.0))
    return ModelConfig(
        encoder=None,
        decoder=stack,
        vocab_size=262_208 if large else 262_144,
        embedding_stddev=stack.d_model**-0.5,
        **_GEMMA_TABLES,
    )


def _gemma(num_layers: int, d_model: int, d_ff: int, heads: tuple[int, int], *, head_dim: int = 256) -> StackConfig:
    """What the Gemmas share; `heads` are those of queries and of keys."""
    return StackConfig(
        num_layers=num_layers,
        d_model=d_model,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        d_ff=d_ff,
        norm_placement="both",
        norm_scale_from_zero=True,
        positions="rope",
    )


def _gemma_2(stack: StackConfig, *, attention_scale: float = 256**-0.5) -> StackConfig:
    return dataclasses.replace(
        stack,
        layer_pattern=("local", "global"),
        window=(4095, 4095),
        attention_softcap=50.0,
        attention_scale=attention_scale,
    )


def _gemma_3(stack: StackConfig, *, window: int = 1023, attention_scale: float = 256**-0.5) -> StackConfig:
    return dataclasses.replace(
        stack,
        layer_pattern=("local",) * 5 + ("global",),
        window=(window, window),
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


def llama_3(size: Literal["1b", "3b", "8b", "70b"] = "1b") -> ModelConfig:
    """Llama 3.2 (1b, 3b) and 3.1 (8b, 70b), whose rotary frequencies are scaled for long rows."""
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
            rope_scaling=RopeScaling(kind="llama3", factor=factor),
        ),
        vocab_size=128_256,
        tie_embeddings=size in ("1b", "3b"),
        embedding_stddev=0.02,
        dtype="bfloat16",
        remat="dots",
    )


def decoder_1b() -> ModelConfig:
    """A causal decoder in the shape of Llama 3.2 1B, without its scaling of rotary frequencies for long rows."""
    config = llama_3("1b")
    assert config.decoder is not None
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, rope_scaling=None))


def mixtral_8x7b() -> ModelConfig:
    """Mixtral: each token takes two of eight experts."""
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
            experts=Experts(num_experts=8, experts_per_token=2),
        ),
        vocab_size=32_000,
        embedding_stddev=0.02,
        dtype="bfloat16",
        remat="dots",
    )


def gpt_2(size: Literal["small", "medium", "large", "xl"] = "small") -> ModelConfig:
    """GPT-2: LayerNorm with biases, learned positions, the token table is the head."""
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


def bert(size: Literal["base", "large"] = "base", *, token_types: int = 2) -> ModelConfig:
    """BERT with its masked-LM head; the batch says which tokens are of its second segment type."""
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
            token_types=token_types,
            dropout_rate=0.1,
        ),
        decoder=None,
        vocab_size=30_522,
        **_MASKED_LM,
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
    of_bert = bert_base()
    base = of_bert.encoder
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
        of_bert,
        encoder=stack(1),
        generator=stack(generator_fraction or default),
        embedding_width=128 if size == "small" else None,
    )


def bert_base() -> ModelConfig:
    """BERT base with one kind of segment, whose vector belongs to the position table."""
    return bert("base", token_types=0)


def modernbert(size: Literal["base", "large"] = "base") -> ModelConfig:
    """ModernBERT: pre-norm without biases, gated MLP, rotary positions, two of three layers local.

    Its own tokenizer pads with id 50283, which encoders do not know for padding: give them segment ids.
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
            window=(64, 64),
            local_rope_base=10_000.0,
        ),
        decoder=None,
        vocab_size=50_368,
        **_MASKED_LM,
    )


def deberta_v3(size: Literal["small", "base", "large"] = "base") -> ModelConfig:
    """DeBERTa-v3's encoder: BERT's blocks, with disentangled attention for positions."""
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


_MASKED_LM: dict[str, Any] = {
    "tie_embeddings": True,
    "embedding_stddev": 0.02,
    "embedding_norm": True,
    "head_transform": True,
    "head_bias": True,
}


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
