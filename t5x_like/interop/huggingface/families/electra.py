"""ELECTRA: its discriminator, whose head is not used, or its generator with the masked-LM head.

Both are BERTs whose embeddings may be narrower than their states.
"""

from __future__ import annotations

import dataclasses

from t5x_like.config.model import ModelConfig
from t5x_like.interop.huggingface.config_reader import Fields
from t5x_like.interop.huggingface.families.bert import BERT, bert_rules, read_bert, write_bert
from t5x_like.interop.huggingface.families.family import Present, Values
from t5x_like.interop.huggingface.weight_map import Rule, dense_rules, norm_rules
from t5x_like.models import presets

_RULES = [
    *(rule for rule in bert_rules("electra", ("query", "key", "value")) if not rule.tensor.startswith("cls.")),
    *dense_rules("electra.embeddings_project", "encoder/embedding_projection"),
    *dense_rules("generator_predictions.dense", "head/transform"),
    *norm_rules("generator_predictions.LayerNorm", "head/transform_norm"),
    Rule("generator_lm_head.bias", ("head/bias",)),
]


def read_electra(fields: Fields, present: Present) -> ModelConfig:
    model = read_bert(fields, present)
    assert model.encoder is not None
    width = fields.integer("embedding_size", 128)
    if width == model.encoder.d_model:
        return model
    # A tied head over the vocabulary would not fit the states of a discriminator with narrow embeddings.
    head = None if present.masked_lm else presets.DISCRIMINATOR_STATES
    return dataclasses.replace(model, embedding_dim=width, task_head=head)


def write_electra(model: ModelConfig) -> Values:
    return {
        **write_bert(model),
        "architectures": ["ElectraForMaskedLM" if model.lm_head_transform else "ElectraModel"],
        "embedding_size": model.lm_head_width,
    }


ELECTRA = dataclasses.replace(
    BERT,
    model_type="electra",
    presets=(presets.electra_encoder,),
    rules=_RULES,
    read=read_electra,
    write=write_electra,
    token_tables=("electra.embeddings.word_embeddings.weight",),
    lm_head="generator_lm_head.weight",
    masked_lm_head="generator_predictions.dense.weight",
    head_bias_copy=None,
    prefix="electra.",
    head_pattern=r"(generator|discriminator|classifier)\w*\.",
    unused_pattern=r"discriminator_predictions\..*",
)
