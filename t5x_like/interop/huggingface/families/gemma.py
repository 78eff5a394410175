"""Gemma 1, 2 and 3 for text."""

from __future__ import annotations

from typing import Any

from t5x_like.config.model import ModelConfig, StackConfig
from t5x_like.interop.huggingface.config_reader import Fields, write_layer_types, write_rope
from t5x_like.interop.huggingface.families.family import Family, Present, SpecialTokens, Values
from t5x_like.interop.huggingface.families.llama import RULES as LLAMA_RULES
from t5x_like.interop.huggingface.families.rotary_stack import (
    read_rotary_stack,
    rotary_stack_rules,
    write_rotary_stack,
)
from t5x_like.interop.huggingface.weight_map import head_rule, table_rule
from t5x_like.models import presets

_NORMS = {
    "self_attention_norm": "input_layernorm",
    "self_attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_RULES = [
    table_rule("model.embed_tokens.weight", "token_embedder"),
    head_rule(),
    *rotary_stack_rules("model", "decoder", _NORMS),
]
TOKENS = SpecialTokens(pad=0, start=2, eos=1)
_GEMMA_STACK: dict[str, Any] = {"norm_placement": "both", "norm_scale_plus_one": True}
GEMMA_MODEL: dict[str, Any] = {"tie_embeddings": True, "scale_embeddings": True}


def read_gemma_2_stack(fields: Fields) -> StackConfig:
    num_layers, window = fields.numbered("num_hidden_layers"), fields.integer("sliding_window", 4096)
    base, scaling = fields.rope(10_000.0)
    return read_rotary_stack(
        fields,
        activation="hidden_activation",
        default="gelu_pytorch_tanh",
        epsilon=1e-6,
        rope_base=base,
        rope_scaling=scaling,
        local_rope_scaling=scaling,
        attention_softcap=fields.optional("attn_logit_softcapping", 50.0),
        attention_scale=fields.inverse_root("query_pre_attn_scalar", 256.0),
        layer_pattern=fields.layer_kinds(num_layers, full_every=2, first_full=1),
        sliding_window=(window - 1, window - 1),
        **_GEMMA_STACK,
    )


def write_gemma_2_stack(stack: StackConfig, window: int) -> Values:
    return {
        **write_rotary_stack(stack, activation="hidden_activation"),
        **_write_scale(stack),
        "rope_parameters": write_rope(stack.rope_base, stack.rope_scaling),
        "attn_logit_softcapping": stack.attention_softcap,
        "layer_types": write_layer_types(stack.layer_kinds),
        "sliding_window": window,
    }


def _write_scale(stack: StackConfig) -> Values:
    scale = stack.head_dim**-0.5 if stack.attention_scale is None else stack.attention_scale
    return {"query_pre_attn_scalar": round(scale**-2)}


def read_gemma_2(fields: Fields, present: Present) -> ModelConfig:
    return ModelConfig(
        encoder=None,
        decoder=read_gemma_2_stack(fields),
        vocab_size=fields.integer("vocab_size"),
        logits_softcap=fields.optional("final_logit_softcapping", 30.0),
        **GEMMA_MODEL,
    )


def write_gemma_2(model: ModelConfig) -> Values:
    stack = model.decoder
    assert stack is not None
    return {
        "architectures": ["Gemma2ForCausalLM"],
        **write_gemma_2_stack(stack, causal_window(stack)),
        "final_logit_softcapping": model.logits_softcap,
        "tie_word_embeddings": True,
        "vocab_size": model.vocab_size,
    }


def causal_window(stack: StackConfig) -> int:
    """Return the number of tokens that a query of a causal local layer attends to, including itself."""
    return 4096 if stack.sliding_window is None else stack.sliding_window[0] + 1


def read_gemma_3_stack(fields: Fields, **more: Any) -> StackConfig:
    num_layers, window = fields.numbered("num_hidden_layers"), fields.integer("sliding_window", 4096)
    every = fields.integer("sliding_window_pattern", 6)
    base, scaling = fields.rope(1_000_000.0, kind="full_attention")
    if isinstance(fields.values.get("rope_parameters"), dict):
        local, local_scaling = fields.rope(10_000.0, kind="sliding_attention")
    else:
        local, local_scaling = fields.number("rope_local_base_freq", 10_000.0), None
    values: dict[str, Any] = {
        "rope_base": base,
        "rope_scaling": scaling,
        "local_rope_base": local,
        "local_rope_scaling": local_scaling,
        # A softcap of the scores can be written in config.json; transformers does not read it.
        "attention_scale": fields.inverse_root("query_pre_attn_scalar", 256.0),
        "layer_pattern": fields.layer_kinds(num_layers, full_every=max(every, 1), first_full=max(every, 1) - 1),
        "sliding_window": (window - 1, window - 1),
        "qk_norm": True,
    }
    return read_rotary_stack(
        fields,
        activation="hidden_activation",
        default="gelu_pytorch_tanh",
        epsilon=1e-6,
        **(values | _GEMMA_STACK | more),
    )


def write_gemma_3_stack(stack: StackConfig, window: int) -> Values:
    local = stack.rope_base if stack.local_rope_base is None else stack.local_rope_base
    return {
        **write_rotary_stack(stack, activation="hidden_activation"),
        **_write_scale(stack),
        "rope_parameters": {
            "full_attention": write_rope(stack.rope_base, stack.rope_scaling),
            "sliding_attention": write_rope(local, stack.local_rope_scaling),
        },
        "layer_types": write_layer_types(stack.layer_kinds),
        "sliding_window": window,
    }


def read_gemma_3(fields: Fields, present: Present) -> ModelConfig:
    return ModelConfig(
        encoder=None,
        decoder=read_gemma_3_stack(fields),
        vocab_size=fields.integer("vocab_size"),
        logits_softcap=fields.optional("final_logit_softcapping"),
        **GEMMA_MODEL,
    )


def write_gemma_3(model: ModelConfig) -> Values:
    stack = model.decoder
    assert stack is not None
    return {
        "architectures": ["Gemma3ForCausalLM"],
        **write_gemma_3_stack(stack, causal_window(stack)),
        "final_logit_softcapping": model.logits_softcap,
        "tie_word_embeddings": True,
        "vocab_size": model.vocab_size,
    }


def read_gemma_1(fields: Fields, present: Present) -> ModelConfig:
    base, scaling = fields.rope(10_000.0)
    # Files of the releases say "gelu" and mean the approximation by tanh.
    if fields.values.get("hidden_act") == "gelu":
        fields = fields.with_value("hidden_act", "gelu_pytorch_tanh")
    stack = read_rotary_stack(
        fields,
        activation="hidden_act",
        default="gelu_pytorch_tanh",
        epsilon=1e-6,
        rope_base=base,
        rope_scaling=scaling,
        norm_scale_plus_one=True,
    )
    return ModelConfig(encoder=None, decoder=stack, vocab_size=fields.integer("vocab_size"), **GEMMA_MODEL)


def write_gemma_1(model: ModelConfig) -> Values:
    stack = model.decoder
    assert stack is not None
    return {
        "architectures": ["GemmaForCausalLM"],
        **write_rotary_stack(stack, activation="hidden_act"),
        "rope_parameters": write_rope(stack.rope_base, stack.rope_scaling),
        "tie_word_embeddings": True,
        "vocab_size": model.vocab_size,
    }


GEMMA_1 = Family(
    model_type="gemma",
    presets=(presets.gemma_1,),
    rules=LLAMA_RULES,
    read=read_gemma_1,
    write=write_gemma_1,
    special_tokens=TOKENS,
    architecture="decoder",
    token_tables=("model.embed_tokens.weight",),
    prefix="model.",
)
GEMMA_2 = Family(
    model_type="gemma2",
    presets=(presets.gemma_2,),
    rules=_RULES,
    read=read_gemma_2,
    write=write_gemma_2,
    special_tokens=TOKENS,
    architecture="decoder",
    token_tables=("model.embed_tokens.weight",),
    prefix="model.",
)
GEMMA_3 = Family(
    model_type="gemma3_text",
    presets=(presets.gemma_3,),
    rules=_RULES,
    read=read_gemma_3,
    write=write_gemma_3,
    special_tokens=TOKENS,
    architecture="decoder",
    token_tables=("model.embed_tokens.weight",),
    prefix="model.",
)
