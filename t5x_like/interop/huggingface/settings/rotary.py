"""Llama, Mixtral, Gemma 2, Gemma 3, T5Gemma and T5Gemma 2, whose stacks are of one build."""

from __future__ import annotations

import dataclasses
from typing import Any

from t5x_like.config.model import Experts, ModelConfig, StackConfig
from t5x_like.interop.huggingface.fields import Fields, write_layer_types, write_rope
from t5x_like.interop.huggingface.settings.common import Present, Values, activation_name


def _rotary_stack(fields: Fields, *, activation: str, default: str, epsilon: float, **more: Any) -> StackConfig:
    """What they share; `activation` is the name of its field."""
    heads, width = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    if fields.flag("use_bidirectional_attention", False):
        raise fields.wrong("use_bidirectional_attention", "false: nothing else is supported")
    values: dict[str, Any] = {
        "num_layers": fields.numbered("num_hidden_layers"),
        "d_model": width,
        "num_heads": heads,
        "num_kv_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": fields.integer("head_dim", width // max(heads, 1)),
        "d_ff": fields.integer("intermediate_size"),
        "mlp_activation": fields.activation(activation, default),
        "norm_epsilon": fields.number("rms_norm_eps", epsilon),
        "positions": "rope",
    }
    return StackConfig(**(values | more))


def _write_rotary_stack(stack: StackConfig, *, activation: str) -> Values:
    return {
        "hidden_size": stack.d_model,
        "intermediate_size": stack.d_ff,
        "num_hidden_layers": stack.num_layers,
        "num_attention_heads": stack.num_heads,
        "num_key_value_heads": stack.num_kv_heads,
        "head_dim": stack.head_dim,
        activation: activation_name(stack.mlp_activation),
        "rms_norm_eps": stack.norm_epsilon,
    }


def read_llama(fields: Fields, present: Present) -> ModelConfig:
    base, scaling = fields.rope(10_000.0)
    return ModelConfig(
        encoder=None,
        decoder=_rotary_stack(
            fields, activation="hidden_act", default="silu", epsilon=1e-6, rope_base=base, rope_scaling=scaling
        ),
        vocab_size=fields.integer("vocab_size"),
        tie_embeddings=not present.head,
        embedding_stddev=0.02,
    )


def write_llama(model: ModelConfig, kind: str) -> Values:
    stack = model.decoder
    assert stack is not None
    return {
        "architectures": ["LlamaForCausalLM"],
        **_write_rotary_stack(stack, activation="hidden_act"),
        "rope_parameters": write_rope(stack.rope_base, stack.rope_scaling),
        "tie_word_embeddings": model.tie_embeddings,
        "vocab_size": model.vocab_size,
    }


def read_mixtral(fields: Fields, present: Present) -> ModelConfig:
    base, scaling = fields.rope(1_000_000.0)
    fields.only("sliding_window", None)
    experts = Experts(
        num_experts=fields.numbered("num_local_experts", 8),
        experts_per_token=fields.integer("num_experts_per_tok", 2),
        load_balancing=fields.number("router_aux_loss_coef", 0.001),
    )
    stack = _rotary_stack(
        fields,
        activation="hidden_act",
        default="silu",
        epsilon=1e-5,
        rope_base=base,
        rope_scaling=scaling,
        experts=experts,
    )
    return ModelConfig(
        encoder=None,
        decoder=stack,
        vocab_size=fields.integer("vocab_size"),
        tie_embeddings=not present.head,
        embedding_stddev=0.02,
    )


def write_mixtral(model: ModelConfig, kind: str) -> Values:
    stack = model.decoder
    assert stack is not None and stack.experts is not None
    return {
        **write_llama(model, kind),
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": stack.experts.num_experts,
        "num_experts_per_tok": stack.experts.experts_per_token,
        "router_aux_loss_coef": stack.experts.load_balancing,
        "sliding_window": None,
    }


_GEMMA_STACK: dict[str, Any] = {"norm_placement": "both", "norm_scale_from_zero": True}
_GEMMA_MODEL: dict[str, Any] = {"tie_embeddings": True, "scale_embeddings": True}


def _gemma_2_stack(fields: Fields) -> StackConfig:
    num_layers, window = fields.numbered("num_hidden_layers"), fields.integer("sliding_window", 4096)
    base, scaling = fields.rope(10_000.0)
    return _rotary_stack(
        fields,
        activation="hidden_activation",
        default="gelu_pytorch_tanh",
        epsilon=1e-6,
        rope_base=base,
        rope_scaling=scaling,
        attention_softcap=fields.optional("attn_logit_softcapping", 50.0),
        attention_scale=fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
        layer_pattern=fields.layer_kinds(num_layers, full_every=2, first_full=1),
        window=(window - 1, window - 1),
        **_GEMMA_STACK,
    )


def _write_gemma_2_stack(stack: StackConfig, window: int) -> Values:
    return {
        **_write_rotary_stack(stack, activation="hidden_activation"),
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
        decoder=_gemma_2_stack(fields),
        vocab_size=fields.integer("vocab_size"),
        logits_softcap=fields.optional("final_logit_softcapping", 30.0),
        **_GEMMA_MODEL,
    )


def write_gemma_2(model: ModelConfig, kind: str) -> Values:
    stack = model.decoder
    assert stack is not None
    return {
        "architectures": ["Gemma2ForCausalLM"],
        **_write_gemma_2_stack(stack, _window(stack)),
        "final_logit_softcapping": model.logits_softcap,
        "tie_word_embeddings": True,
        "vocab_size": model.vocab_size,
    }


def _window(stack: StackConfig) -> int:
    """Cells that a query of a causal local layer sees, itself among them."""
    return 4096 if stack.window is None else stack.window[0] + 1


def _gemma_3_stack(fields: Fields, **more: Any) -> StackConfig:
    num_layers, window = fields.numbered("num_hidden_layers"), fields.integer("sliding_window", 4096)
    every = fields.integer("sliding_window_pattern", 6)
    base, scaling = fields.rope(1_000_000.0, kind="full_attention")
    if isinstance(fields.values.get("rope_parameters"), dict):
        local, local_scaling = fields.rope(10_000.0, kind="sliding_attention")
    else:
        local, local_scaling = fields.number("rope_local_base_freq", 10_000.0), None
    if local_scaling is not None:
        raise fields.wrong("rope_parameters", "no scaling of local layers' frequencies")
    values: dict[str, Any] = {
        "rope_base": base,
        "rope_scaling": scaling,
        "local_rope_base": local,
        # A softcap of the scores can be written in config.json; transformers does not read it.
        "attention_scale": fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
        "layer_pattern": fields.layer_kinds(num_layers, full_every=max(every, 1), first_full=max(every, 1) - 1),
        "window": (window - 1, window - 1),
        "qk_norm": True,
    }
    return _rotary_stack(
        fields,
        activation="hidden_activation",
        default="gelu_pytorch_tanh",
        epsilon=1e-6,
        **(values | _GEMMA_STACK | more),
    )


def _write_gemma_3_stack(stack: StackConfig, window: int) -> Values:
    local = stack.rope_base if stack.local_rope_base is None else stack.local_rope_base
    return {
        **_write_rotary_stack(stack, activation="hidden_activation"),
        **_write_scale(stack),
        "rope_parameters": {
            "full_attention": write_rope(stack.rope_base, stack.rope_scaling),
            "sliding_attention": write_rope(local, None),
        },
        "layer_types": write_layer_types(stack.layer_kinds),
        "sliding_window": window,
    }


def read_gemma_3(fields: Fields, present: Present) -> ModelConfig:
    return ModelConfig(
        encoder=None,
        decoder=_gemma_3_stack(fields),
        vocab_size=fields.integer("vocab_size"),
        logits_softcap=fields.optional("final_logit_softcapping"),
        **_GEMMA_MODEL,
    )


def write_gemma_3(model: ModelConfig, kind: str) -> Values:
    stack = model.decoder
    assert stack is not None
    return {
        "architectures": ["Gemma3ForCausalLM"],
        **_write_gemma_3_stack(stack, _window(stack)),
        "final_logit_softcapping": model.logits_softcap,
        "tie_word_embeddings": True,
        "vocab_size": model.vocab_size,
    }


def read_t5gemma(fields: Fields, present: Present) -> ModelConfig:
    encoder, decoder = fields.part("encoder"), fields.part("decoder")
    window = encoder.integer("sliding_window", 4096)
    return ModelConfig(
        encoder=dataclasses.replace(_gemma_2_stack(encoder), window=(window, window)),
        decoder=_gemma_2_stack(decoder),
        vocab_size=decoder.integer("vocab_size"),
        separate_encoder_embeddings=True,
        logits_softcap=decoder.optional("final_logit_softcapping", 30.0),
        **(_GEMMA_MODEL | {"tie_embeddings": not present.head}),
    )


def write_t5gemma(model: ModelConfig, kind: str) -> Values:
    encoder, decoder = model.encoder, model.decoder
    assert encoder is not None and decoder is not None
    shared = {"model_type": "t5_gemma_module", "vocab_size": model.vocab_size, "tie_word_embeddings": True}
    of_encoder = _write_gemma_2_stack(encoder, 4096 if encoder.window is None else encoder.window[0])
    of_decoder = _write_gemma_2_stack(decoder, _window(decoder))
    cap = {"final_logit_softcapping": model.logits_softcap}
    return {
        "architectures": ["T5GemmaForConditionalGeneration"],
        "is_encoder_decoder": True,
        "encoder": {**shared, **of_encoder, **cap},
        "decoder": {
            **shared,
            **of_decoder,
            **cap,
            "is_decoder": True,
            "cross_attention_hidden_size": encoder.d_model,
        },
        "tie_word_embeddings": model.tie_embeddings,
        "vocab_size": model.vocab_size,
    }


def read_t5gemma_2(fields: Fields, present: Present) -> ModelConfig:
    encoder, decoder = fields.part("encoder").part("text_config"), fields.part("decoder")
    width = encoder.integer("sliding_window", 4096)
    return ModelConfig(
        encoder=_gemma_3_stack(encoder, window=((width + 1) // 2 - 1, width // 2)),
        decoder=_gemma_3_stack(decoder, cross_attention="merged"),
        vocab_size=decoder.integer("vocab_size"),
        unscaled_token=fields.integer("eoi_token_index", fields.part("encoder").integer("eoi_token_index", 256_000)),
        logits_softcap=decoder.optional("final_logit_softcapping"),
        **(_GEMMA_MODEL | {"tie_embeddings": not present.head}),
    )


def write_t5gemma_2(model: ModelConfig, kind: str) -> Values:
    encoder, decoder = model.encoder, model.decoder
    assert encoder is not None and decoder is not None
    width = 4096 if encoder.window is None else encoder.window[0] + encoder.window[1] + 1
    cap = {"final_logit_softcapping": model.logits_softcap, "vocab_size": model.vocab_size}
    return {
        "architectures": ["T5Gemma2ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "encoder": {
            "model_type": "t5gemma2_encoder",
            "text_config": {"model_type": "t5gemma2_text", **_write_gemma_3_stack(encoder, width), **cap},
            "eoi_token_index": model.unscaled_token,
        },
        "decoder": {"model_type": "t5gemma2_decoder", **_write_gemma_3_stack(decoder, _window(decoder)), **cap},
        "eoi_token_index": model.unscaled_token,
        "tie_word_embeddings": model.tie_embeddings,
        "vocab_size": model.vocab_size,
    }
