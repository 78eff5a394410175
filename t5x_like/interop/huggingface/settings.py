"""config.json to ModelConfig and back, by family.

What is read is the file, not what transformers makes of it: version 5 rewrites `tie_word_embeddings` of T5s, for one.
Old and new spellings are read, new ones written.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from t5x_like.config.errors import DataError
from t5x_like.config.model import Activation, Experts, ModelConfig, StackConfig
from t5x_like.interop.huggingface.fields import ACTIVATIONS, Fields, write_layer_types, write_rope

Values = dict[str, Any]
_TIED_LM: dict[str, Any] = {"tie_embeddings": True, "embedding_stddev": 0.02}


@dataclasses.dataclass(frozen=True)
class Present:
    """What of a model the files hold, as far as config.json does not say.

    Attributes:
      head: A head of its own: with other numbers than the token table where both are there.
      masked_lm: The layers of a head over the vocabulary of an encoder.
    """

    head: bool = False
    masked_lm: bool = True


def _activation(activation: Activation, *, tanh: str = "gelu_pytorch_tanh") -> str:
    if activation == "gelu_tanh":
        return tanh
    return next(name for name, own in ACTIVATIONS.items() if own == activation)


# T5, mT5, umT5


def read_t5(fields: Fields, present: Present) -> ModelConfig:
    kind = fields.values["model_type"]
    projection = str(fields.values.get("feed_forward_proj", "relu"))
    name = "gelu_new" if projection == "gated-gelu" else projection.removeprefix("gated-")
    if name not in ACTIVATIONS:
        raise fields.wrong("feed_forward_proj", f"gated- or not, then one of {', '.join(ACTIVATIONS)}")
    heads = fields.integer("num_heads")
    encoder = StackConfig(
        num_layers=fields.numbered("num_layers"),
        d_model=fields.integer("d_model"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=fields.integer("d_kv", 64),
        d_ff=fields.integer("d_ff"),
        mlp_activation=ACTIVATIONS[name],
        mlp_gated=projection.startswith("gated-"),
        norm_epsilon=fields.number("layer_norm_epsilon", 1e-6),
        relative_bias_buckets=fields.integer("relative_attention_num_buckets", 32),
        relative_bias_max_distance=fields.integer("relative_attention_max_distance", 128),
        relative_bias_per_layer=kind == "umt5",
        attention_scale=1.0,
        dropout_rate=fields.number("dropout_rate", 0.1),
        dropout_broadcast_length=True,
    )
    scaled = fields.flag("scale_decoder_outputs", fields.flag("tie_word_embeddings", True))
    return ModelConfig(
        encoder=encoder,
        decoder=dataclasses.replace(
            encoder,
            num_layers=fields.numbered("num_decoder_layers", encoder.num_layers),
            relative_bias_bidirectional=False,
        ),
        vocab_size=fields.integer("vocab_size"),
        tie_embeddings=not present.head,
        # umT5 was trained without; transformers 5 scales it all the same.
        scale_logits=scaled if kind == "t5" else False,
    )


def write_t5(model: ModelConfig, kind: str) -> Values:
    encoder, decoder = model.encoder, model.decoder
    assert encoder is not None and decoder is not None
    activation = _activation(encoder.mlp_activation, tanh="gelu" if encoder.mlp_gated else "gelu_new")
    if encoder.mlp_gated and encoder.mlp_activation == "gelu":
        raise DataError("a gated MLP with GELU by the error function has no name in T5's config.json")
    return {
        "architectures": [{"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}[kind] + "ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "d_model": encoder.d_model,
        "d_kv": encoder.head_dim,
        "d_ff": encoder.d_ff,
        "num_layers": encoder.num_layers,
        "num_decoder_layers": decoder.num_layers,
        "num_heads": encoder.num_heads,
        "feed_forward_proj": f"gated-{activation}" if encoder.mlp_gated else activation,
        "layer_norm_epsilon": encoder.norm_epsilon,
        "relative_attention_num_buckets": encoder.relative_bias_buckets,
        "relative_attention_max_distance": encoder.relative_bias_max_distance,
        "dropout_rate": encoder.dropout_rate,
        "tie_word_embeddings": model.tie_embeddings,
        "scale_decoder_outputs": model.scale_logits,
        "vocab_size": model.vocab_size,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


# Llama, Mixtral, Gemma 2, Gemma 3, T5Gemma, T5Gemma 2: stacks of one build


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
        activation: _activation(stack.mlp_activation),
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


# GPT-2


def read_gpt_2(fields: Fields, present: Present) -> ModelConfig:
    for name, value in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        fields.only(name, value)
    fields.only("add_cross_attention", False)
    width, heads = fields.integer("n_embd"), fields.integer("n_head")
    return ModelConfig(
        encoder=None,
        decoder=StackConfig(
            num_layers=fields.numbered("n_layer"),
            d_model=width,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=width // max(heads, 1),
            d_ff=fields.integer("n_inner", 4 * width),
            mlp_activation=fields.activation("activation_function", "gelu_new"),
            mlp_gated=False,
            norm="layernorm",
            norm_epsilon=fields.number("layer_norm_epsilon", 1e-5),
            use_bias=True,
            positions="learned",
            max_positions=fields.integer("n_positions", 1024),
            dropout_rate=fields.number("resid_pdrop", 0.1),
        ),
        vocab_size=fields.integer("vocab_size"),
        **_TIED_LM,
    )


def write_gpt_2(model: ModelConfig, kind: str) -> Values:
    stack = model.decoder
    assert stack is not None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": stack.d_model,
        "n_head": stack.num_heads,
        "n_inner": stack.d_ff,
        "n_layer": stack.num_layers,
        "n_positions": stack.max_positions,
        "activation_function": _activation(stack.mlp_activation, tanh="gelu_new"),
        "layer_norm_epsilon": stack.norm_epsilon,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), stack.dropout_rate),
        "tie_word_embeddings": True,
        "vocab_size": model.vocab_size,
    }


# BERT, DeBERTa-v3, ModernBERT


def _bert_model(stack: StackConfig, fields: Fields, present: Present) -> ModelConfig:
    masked_lm = {"head_transform": present.masked_lm, "head_bias": present.masked_lm}
    return ModelConfig(
        encoder=stack,
        decoder=None,
        vocab_size=fields.integer("vocab_size"),
        embedding_norm=True,
        **(_TIED_LM | masked_lm),
    )


def _bert_stack(fields: Fields, **more: Any) -> StackConfig:
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    values: dict[str, Any] = {
        "num_layers": fields.numbered("num_hidden_layers"),
        "d_model": width,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // max(heads, 1),
        "d_ff": fields.integer("intermediate_size"),
        "mlp_activation": fields.activation("hidden_act", "gelu"),
        "mlp_gated": False,
        "norm": "layernorm",
        "norm_placement": "post",
        "use_bias": True,
        "dropout_rate": fields.number("hidden_dropout_prob", 0.1),
    }
    return StackConfig(**(values | more))


def _write_bert(model: ModelConfig, name: str) -> Values:
    stack = model.encoder
    assert stack is not None
    return {
        "architectures": [f"{name}ForMaskedLM" if model.head_transform else f"{name}Model"],
        "hidden_size": stack.d_model,
        "num_attention_heads": stack.num_heads,
        "num_hidden_layers": stack.num_layers,
        "intermediate_size": stack.d_ff,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": True,
    }


def _write_dropout(stack: StackConfig) -> Values:
    return dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), stack.dropout_rate)


def read_bert(fields: Fields, present: Present) -> ModelConfig:
    fields.only("is_decoder", False)
    fields.only("position_embedding_type", "absolute")
    stack = _bert_stack(
        fields,
        positions="learned",
        max_positions=fields.integer("max_position_embeddings", 512),
        token_types=fields.integer("type_vocab_size", 2),
        norm_epsilon=fields.number("layer_norm_eps", 1e-12),
    )
    return _bert_model(stack, fields, present)


def write_bert(model: ModelConfig, kind: str) -> Values:
    stack = model.encoder
    assert stack is not None
    return {
        **_write_bert(model, "Bert"),
        **_write_dropout(stack),
        "hidden_act": _activation(stack.mlp_activation, tanh="gelu_new"),
        "max_position_embeddings": stack.max_positions,
        "type_vocab_size": stack.token_types,
        "layer_norm_eps": stack.norm_epsilon,
    }


def read_deberta(fields: Fields, present: Present) -> ModelConfig:
    for name, expected, default in (
        ("relative_attention", True, False),
        ("position_biased_input", False, True),
        ("share_att_key", True, False),
        ("norm_rel_ebd", "layer_norm", "none"),
        ("type_vocab_size", 0, 0),
        ("conv_kernel_size", 0, 0),
        ("legacy", True, True),
    ):
        fields.only(name, expected, default)
    kinds = fields.values.get("pos_att_type")
    kinds = kinds.split("|") if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or sorted(map(str, kinds)) != ["c2p", "p2c"]:
        raise fields.wrong("pos_att_type", "c2p and p2c")
    if fields.has("embedding_size"):
        fields.only("embedding_size", fields.integer("hidden_size"))
    distance = fields.values.get("max_relative_positions", -1)
    if not isinstance(distance, int) or distance < 1:
        distance = fields.integer("max_position_embeddings", 512)
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    stack = _bert_stack(
        fields,
        positions="disentangled",
        relative_bias_buckets=fields.integer("position_buckets"),
        relative_bias_max_distance=distance,
        attention_scale=(3 * (width // max(heads, 1))) ** -0.5,
        norm_epsilon=fields.number("layer_norm_eps", 1e-7),
    )
    return _bert_model(stack, fields, present)


def write_deberta(model: ModelConfig, kind: str) -> Values:
    stack = model.encoder
    assert stack is not None
    return {
        **_write_bert(model, "DebertaV2"),
        **_write_dropout(stack),
        "hidden_act": _activation(stack.mlp_activation, tanh="gelu_new"),
        "layer_norm_eps": stack.norm_epsilon,
        "relative_attention": True,
        "position_biased_input": False,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "type_vocab_size": 0,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": stack.relative_bias_buckets,
        "max_relative_positions": stack.relative_bias_max_distance,
        "max_position_embeddings": stack.relative_bias_max_distance,
    }


def read_modernbert(fields: Fields, present: Present) -> ModelConfig:
    for name in ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"):
        fields.only(name, False)
    fields.only("decoder_bias", True)
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    every = max(fields.integer("global_attn_every_n_layers", 3), 1)
    if isinstance(fields.values.get("rope_parameters"), dict):
        bases = [fields.rope(0.0, kind=kind)[0] for kind in ("full_attention", "sliding_attention")]
    else:
        bases = [fields.number("global_rope_theta", 160_000.0), fields.number("local_rope_theta", 10_000.0)]
    num_layers, half = fields.numbered("num_hidden_layers"), fields.integer("local_attention", 128) // 2
    activation = fields.activation("hidden_activation", "gelu")
    fields.only("classifier_activation", fields.values.get("hidden_activation", "gelu"), "gelu")
    stack = StackConfig(
        num_layers=num_layers,
        d_model=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // max(heads, 1),
        d_ff=fields.integer("intermediate_size"),
        mlp_activation=activation,
        norm="layernorm",
        norm_epsilon=fields.number("norm_eps", 1e-5),
        first_layer_attention_norm=False,
        positions="rope",
        rope_base=bases[0],
        local_rope_base=bases[1],
        layer_pattern=fields.layer_kinds(num_layers, full_every=every, first_full=0),
        window=(half, half),
        dropout_rate=fields.number("mlp_dropout", 0.0),
    )
    return _bert_model(stack, fields, present)


def write_modernbert(model: ModelConfig, kind: str) -> Values:
    stack = model.encoder
    assert stack is not None
    local = stack.rope_base if stack.local_rope_base is None else stack.local_rope_base
    return {
        **_write_bert(model, "ModernBert"),
        "hidden_activation": _activation(stack.mlp_activation),
        "norm_eps": stack.norm_epsilon,
        "layer_types": write_layer_types(stack.layer_kinds),
        "local_attention": 128 if stack.window is None else 2 * stack.window[0],
        "rope_parameters": {
            "full_attention": write_rope(stack.rope_base, None),
            "sliding_attention": write_rope(local, None),
        },
        **dict.fromkeys(("attention_dropout", "embedding_dropout", "mlp_dropout"), stack.dropout_rate),
    }
