"""DeBERTa-v3."""

from __future__ import annotations

from t5x_like.config.model import ModelConfig
from t5x_like.interop.huggingface.config_reader import Fields
from t5x_like.interop.huggingface.families.bert import (
    LAYER_NORM_RENAMES,
    TOKENS,
    bert_model,
    bert_rules,
    read_bert_stack,
    write_dropout,
    write_encoder,
)
from t5x_like.interop.huggingface.families.family import Family, Present, Values, activation_name
from t5x_like.interop.huggingface.weight_map import norm_rules, table_rule
from t5x_like.models import presets

_RULES = [
    *bert_rules("deberta", ("query_proj", "key_proj", "value_proj")),
    table_rule("deberta.encoder.rel_embeddings.weight", "encoder/distance_embedder"),
    *norm_rules("deberta.encoder.LayerNorm", "encoder/distance_norm"),
]


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
    stack = read_bert_stack(
        fields,
        positions="disentangled",
        relative_bias_buckets=fields.integer("position_buckets"),
        relative_bias_max_distance=distance,
        attention_scale=(3 * max(width // max(heads, 1), 1)) ** -0.5,
        norm_epsilon=fields.number("layer_norm_eps", 1e-7),
    )
    return bert_model(stack, fields, present)


def write_deberta(model: ModelConfig) -> Values:
    stack = model.encoder
    assert stack is not None
    return {
        **write_encoder(model, "DebertaV2"),
        **write_dropout(stack),
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


DEBERTA = Family(
    model_type="deberta-v2",
    presets=(presets.deberta_v3,),
    rules=_RULES,
    read=read_deberta,
    write=write_deberta,
    special_tokens=TOKENS,
    architecture="encoder",
    token_tables=("deberta.embeddings.word_embeddings.weight",),
    lm_head="cls.predictions.decoder.weight",
    masked_lm_head="cls.predictions.transform.dense.weight",
    head_bias_copy="cls.predictions.decoder.bias",
    prefix="deberta.",
    head_pattern=r"(cls|classifier|pooler|lm_predictions|mask_predictions)\.",
    unused_pattern=r"(lm_predictions|mask_predictions)\..*",
    renames=LAYER_NORM_RENAMES,
)
