"""Presets of LTG-BERT and GPT-BERT, the models of the BabyLM challenge of the Language Technology Group in Oslo."""

from __future__ import annotations

import math
from typing import Any, Literal

from t5x_like.config.model import ModelConfig, StackConfig

_BUCKETS, _MAX_POSITIONS = 32, 512


def ltg_bert(size: Literal["small", "base"] = "base") -> ModelConfig:
    """Return LTG-BERT (Samuel et al. 2023): disentangled attention, a gated MLP and the norms of NormFormer. Only the
    norm after attention and the norm of the relative positions have parameters.

    The published table of relative positions has 63 rows; here it has a 64th, for keys that are 512 or more tokens to
    the right.
    """
    d_model, d_ff = {"small": (384, 1024), "base": (768, 2048)}[size]
    stack = _stack(d_model, d_ff, norm_placement="normformer", norm_epsilon=1e-7)
    return ModelConfig(encoder=stack, decoder=None, **_model(d_model, 16_384))


def gpt_bert(size: Literal["small", "base"] = "base") -> ModelConfig:
    """Return GPT-BERT (Charpentier and Samuel 2024): one stack that is trained to predict next tokens, causally and in
    masked text. LTG-BERT with gated attention, norms before the output projections, and weighted sums over its depth.

    Its data have layout `prefix_lm`, with `MaskedLM` (the masked next token) and `CausalLM`.
    """
    d_model, d_ff, vocab_size = {"small": (384, 1280, 8_192), "base": (768, 2560, 16_384)}[size]
    stack = _stack(d_model, d_ff, norm_placement="sub", norm_epsilon=1e-5, attention_gate=True, depth_weights=True)
    return ModelConfig(encoder=None, decoder=stack, **_model(d_model, vocab_size))


def _stack(d_model: int, d_ff: int, **changes: Any) -> StackConfig:
    return StackConfig(
        num_layers=12,
        d_model=d_model,
        num_heads=d_model // 64,
        num_kv_heads=d_model // 64,
        head_dim=64,
        d_ff=d_ff,
        mlp_activation="gelu_tanh",
        norm="layernorm",
        norm_parameters=False,
        use_bias=True,
        mlp_bias=False,
        positions="disentangled",
        relative_bias_buckets=_BUCKETS,
        relative_bias_max_distance=_MAX_POSITIONS,
        attention_scale=(3 * 64) ** -0.5,
        dropout_rate=0.1,
        **changes,
    )


def _model(d_model: int, vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "tie_embeddings": True,
        "embedding_stddev": math.sqrt(2 / (5 * d_model)),
        "embedding_norm": True,
        "lm_head_transform": True,
        "lm_head_activation": "gelu",
        "head_bias": True,
    }
