"""LongT5 with local attention: T5 whose encoder attends within a window.

The variant with transient global tokens is refused by name.
"""

from __future__ import annotations

import dataclasses

from t5x_like.config.model import ModelConfig
from t5x_like.errors import DataError
from t5x_like.interop.huggingface.config_reader import Fields
from t5x_like.interop.huggingface.families.family import Present, Values
from t5x_like.interop.huggingface.families.t5 import T5, read_t5, t5_stack_rules, write_t5
from t5x_like.interop.huggingface.weight_map import head_rule, table_rule
from t5x_like.models import presets


def read_long_t5(fields: Fields, present: Present) -> ModelConfig:
    fields.only("encoder_attention_type", "local")
    fields.unused("global_block_size")  # For transient global tokens.
    model = read_t5(fields, present, may_scale_logits=True, default="relu")
    radius = fields.integer("local_radius", 127)
    assert model.encoder is not None
    encoder = dataclasses.replace(model.encoder, layer_pattern=("local",), sliding_window=(radius, radius))
    return dataclasses.replace(model, encoder=encoder)


def write_long_t5(model: ModelConfig) -> Values:
    encoder = model.encoder
    assert encoder is not None
    window = encoder.sliding_window
    if window is None or window[0] != window[1] or "global" in encoder.layer_kinds:
        raise DataError("LongT5's config.json expresses encoders with one symmetric window in all layers only")
    return {
        **write_t5(model, architecture="LongT5ForConditionalGeneration"),
        "encoder_attention_type": "local",
        "local_radius": window[0],
    }


LONG_T5 = dataclasses.replace(
    T5,
    model_type="longt5",
    presets=(presets.long_t5,),
    rules=[
        table_rule("shared.weight", "token_embedder"),
        head_rule(),
        *t5_stack_rules("encoder", 1, "LocalSelfAttention"),
        *t5_stack_rules("decoder", 2),
    ],
    read=read_long_t5,
    write=write_long_t5,
)
