"""BERT, DeBERTa-v3 and ModernBERT: config.json to ModelConfig and back."""

from __future__ import annotations

from typing import Any

from t5x_like.config.model import ModelConfig, StackConfig
from t5x_like.interop.huggingface.fields import Fields, write_layer_types, write_rope
from t5x_like.interop.huggingface.settings.common import TIED_LM, Present, Values, activation_name


def _bert_model(stack: StackConfig, fields: Fields, present: Present) -> ModelConfig:
    masked_lm = {"head_transform": present.masked_lm, "head_bias": present.masked_lm}
    return ModelConfig(
        encoder=stack,
        decoder=None,
        vocab_size=fields.integer("vocab_size"),
        embedding_norm=True,
        **(TIED_LM | masked_lm),
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
        "hidden_act": activation_name(stack.mlp_activation, tanh="gelu_new"),
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
        "hidden_act": activation_name(stack.mlp_activation, tanh="gelu_new"),
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
        "hidden_activation": activation_name(stack.mlp_activation),
        "norm_eps": stack.norm_epsilon,
        "layer_types": write_layer_types(stack.layer_kinds),
        "local_attention": 128 if stack.window is None else 2 * stack.window[0],
        "rope_parameters": {
            "full_attention": write_rope(stack.rope_base, None),
            "sliding_attention": write_rope(local, None),
        },
        **dict.fromkeys(("attention_dropout", "embedding_dropout", "mlp_dropout"), stack.dropout_rate),
    }
