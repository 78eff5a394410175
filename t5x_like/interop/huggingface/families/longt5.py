"""LongT5: T5 whose encoder attends within a window and, with transient global attention, to the sums of blocks."""

from __future__ import annotations

import dataclasses
import functools

from t5x_like.config.model import ModelConfig
from t5x_like.errors import DataError
from t5x_like.interop.huggingface.config_reader import Fields
from t5x_like.interop.huggingface.families.family import Present, Values
from t5x_like.interop.huggingface.families.t5 import T5, read_t5, t5_stack_rules, write_t5
from t5x_like.interop.huggingface.weight_map import Rule, head_rule, table_rule
from t5x_like.models import presets

LOCAL, TRANSIENT_GLOBAL = "local", "transient-global"


def read_long_t5(fields: Fields, present: Present) -> ModelConfig:
    model = read_t5(fields, present, may_scale_logits=True, default="relu")
    radius, block_size = fields.integer("local_radius", 127), fields.integer("global_block_size", 16)
    is_global = fields.values.get("encoder_attention_type", LOCAL) == TRANSIENT_GLOBAL
    if not is_global:
        fields.only("encoder_attention_type", LOCAL)
    assert model.encoder is not None
    encoder = dataclasses.replace(
        model.encoder,
        layer_pattern=("local",),
        sliding_window=(radius, radius),
        global_block_size=block_size if is_global else None,
    )
    return dataclasses.replace(model, encoder=encoder)


def write_long_t5(model: ModelConfig, *, attention: str) -> Values:
    encoder = model.encoder
    assert encoder is not None
    window = encoder.sliding_window
    if window is None or window[0] != window[1] or "global" in encoder.layer_kinds:
        raise DataError("LongT5's config.json expresses encoders with one symmetric window in all layers only")
    return {
        **write_t5(model, architecture="LongT5ForConditionalGeneration"),
        "encoder_attention_type": attention,
        "local_radius": window[0],
        "global_block_size": encoder.global_block_size or 16,
    }


def _rules(attention: str) -> list[Rule]:
    encoder, decoder = t5_stack_rules("encoder", 1, attention), t5_stack_rules("decoder", 2)
    return [table_rule("shared.weight", "token_embedder"), head_rule(), *encoder, *decoder]


LONG_T5 = dataclasses.replace(
    T5,
    model_type="longt5",
    presets=(presets.long_t5,),
    rules=_rules("LocalSelfAttention"),
    read=read_long_t5,
    write=functools.partial(write_long_t5, attention=LOCAL),
)
LONG_T5_GLOBAL = dataclasses.replace(
    LONG_T5,
    model_type="longt5_global",
    variant_of="longt5",
    variant_field=("encoder_attention_type", TRANSIENT_GLOBAL),
    presets=(functools.partial(presets.long_t5, block_size=16),),
    rules=_rules("TransientGlobalSelfAttention"),
    write=functools.partial(write_long_t5, attention=TRANSIENT_GLOBAL),
)
