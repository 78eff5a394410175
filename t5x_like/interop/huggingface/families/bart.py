"""BART, and mBART, which normalizes before each branch."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from t5x_like.config.model import ModelConfig, StackConfig
from t5x_like.interop.huggingface.config_reader import Fields
from t5x_like.interop.huggingface.families.family import (
    TIED_LM,
    Family,
    Present,
    SpecialTokens,
    Values,
    activation_name,
)
from t5x_like.interop.huggingface.weight_map import Rule, attention_rules, dense_rules, norm_rules, table_rule
from t5x_like.models import presets

_OFFSET = 2
"""Rows of the position tables before the first position."""
_EPSILON = 1e-5
"""Epsilon of all norms; config.json has no field for it."""
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def _stack_rules(name: str) -> list[Rule]:
    tensors, layer, layers = f"model.{name}", f"model.{name}.layers.{{layer}}", f"{name}/layers"
    rules = [
        table_rule(f"{tensors}.embed_positions.weight", f"{name}/position_embedder"),
        *norm_rules(f"{tensors}.layernorm_embedding", f"{name}/embedding_norm"),
        *norm_rules(f"{tensors}.layer_norm", f"{name}/final_norm"),
        *attention_rules(f"{layer}.self_attn", f"{layers}/self_attention", _PROJECTIONS),
        *norm_rules(f"{layer}.self_attn_layer_norm", f"{layers}/self_attention_norm"),
        *dense_rules(f"{layer}.fc1", f"{layers}/mlp/wi"),
        *dense_rules(f"{layer}.fc2", f"{layers}/mlp/wo"),
        *norm_rules(f"{layer}.final_layer_norm", f"{layers}/mlp_norm"),
    ]
    if name == "decoder":
        rules += attention_rules(f"{layer}.encoder_attn", f"{layers}/cross_attention", _PROJECTIONS)
        rules += norm_rules(f"{layer}.encoder_attn_layer_norm", f"{layers}/cross_attention_norm")
    return rules


_RULES = [
    table_rule("model.shared.weight", "token_embedder"),
    Rule("final_logits_bias", ("head/bias",), "row"),
    *_stack_rules("encoder"),
    *_stack_rules("decoder"),
]


def _read_stack(fields: Fields, name: str, **more: Any) -> StackConfig:
    width, heads = fields.integer("d_model"), fields.integer(f"{name}_attention_heads", 16)
    return StackConfig(
        num_layers=fields.numbered(f"{name}_layers", 12),
        d_model=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // max(heads, 1),
        d_ff=fields.integer(f"{name}_ffn_dim", 4096),
        mlp_activation=fields.activation("activation_function", "gelu"),
        mlp_gated=False,
        norm="layernorm",
        norm_epsilon=_EPSILON,
        use_bias=True,
        positions="learned",
        max_positions=fields.integer("max_position_embeddings", 1024),
        position_offset=_OFFSET,
        dropout_rate=fields.number("dropout", 0.1),
        **more,
    )


def read_bart(fields: Fields, present: Present, *, is_pre_norm: bool) -> ModelConfig:
    """Return the model of a config.json of BART, or with `is_pre_norm` of mBART."""
    # Fields of the first releases, which decide what the two families decide now.
    fields.only("normalize_before", is_pre_norm)
    fields.only("add_final_layer_norm", is_pre_norm)
    fields.only("normalize_embedding", True)
    fields.only("static_position_embeddings", False)
    placement = "pre" if is_pre_norm else "post"
    return ModelConfig(
        encoder=_read_stack(fields, "encoder", norm_placement=placement),
        decoder=_read_stack(fields, "decoder", norm_placement=placement),
        vocab_size=fields.integer("vocab_size"),
        scale_embeddings=fields.flag("scale_embedding", False),
        embedding_norm=True,
        head_bias=True,
        **TIED_LM,
    )


def write_bart(model: ModelConfig, *, architecture: str) -> Values:
    """Return the fields of config.json; `architecture` is the class name in transformers."""
    encoder = model.encoder
    assert encoder is not None
    values: Values = {
        "architectures": [architecture],
        "is_encoder_decoder": True,
        "d_model": encoder.d_model,
        "activation_function": activation_name(encoder.mlp_activation, tanh="gelu_new"),
        "max_position_embeddings": encoder.max_positions,
        "dropout": encoder.dropout_rate,
        "scale_embedding": model.scale_embeddings,
        "tie_word_embeddings": True,
        "vocab_size": model.vocab_size,
    }
    for name, stack in model.stacks.items():
        values |= {
            f"{name}_layers": stack.num_layers,
            f"{name}_attention_heads": stack.num_heads,
            f"{name}_ffn_dim": stack.d_ff,
        }
    return values


BART = Family(
    model_type="bart",
    presets=(presets.bart,),
    rules=_RULES,
    read=functools.partial(read_bart, is_pre_norm=False),
    write=functools.partial(write_bart, architecture="BartForConditionalGeneration"),
    special_tokens=SpecialTokens(pad=1, start=2, eos=2),
    architecture="encoder_decoder",
    token_tables=("model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"),
)
MBART = dataclasses.replace(
    BART,
    model_type="mbart",
    presets=(presets.mbart,),
    read=functools.partial(read_bart, is_pre_norm=True),
    write=functools.partial(write_bart, architecture="MBartForConditionalGeneration"),
)
