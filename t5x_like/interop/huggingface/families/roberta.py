"""RoBERTa and XLM-R: BERT whose positions begin at the padding id plus one, and with other names of its head."""

from __future__ import annotations

import dataclasses
import functools

from t5x_like.config.model import ModelConfig
from t5x_like.interop.huggingface.config_reader import Fields
from t5x_like.interop.huggingface.families.bert import BERT, bert_model, bert_rules, read_bert_stack, write_bert
from t5x_like.interop.huggingface.families.family import Present, SpecialTokens, Values
from t5x_like.interop.huggingface.weight_map import Rule, dense_rules, norm_rules
from t5x_like.models import presets

_OFFSET = 2
"""Padding id of all releases, plus one."""
_RULES = [
    *(rule for rule in bert_rules("roberta", ("query", "key", "value")) if not rule.tensor.startswith("cls.")),
    *dense_rules("lm_head.dense", "head/transform"),
    *norm_rules("lm_head.layer_norm", "head/transform_norm"),
    Rule("lm_head.bias", ("head/bias",)),
]


def read_roberta(fields: Fields, present: Present) -> ModelConfig:
    fields.only("is_decoder", False)
    fields.only("position_embedding_type", "absolute")
    fields.only("pad_token_id", _OFFSET - 1)
    stack = read_bert_stack(
        fields,
        positions="learned",
        max_positions=fields.integer("max_position_embeddings", 512) - _OFFSET,
        position_offset=_OFFSET,
        num_token_types=fields.integer("type_vocab_size", 2),
        norm_epsilon=fields.number("layer_norm_eps", 1e-12),
    )
    return bert_model(stack, fields, present)


def write_roberta(model: ModelConfig, *, name: str) -> Values:
    """Return the fields of config.json; `name` begins the class name in transformers."""
    stack = model.encoder
    assert stack is not None
    return {
        **write_bert(model),
        "architectures": [f"{name}ForMaskedLM" if model.lm_head_transform else f"{name}Model"],
        "max_position_embeddings": stack.max_positions + _OFFSET,
    }


ROBERTA = dataclasses.replace(
    BERT,
    model_type="roberta",
    presets=(presets.roberta,),
    rules=_RULES,
    read=read_roberta,
    write=functools.partial(write_roberta, name="Roberta"),
    special_tokens=SpecialTokens(pad=1, start=0, eos=2),
    token_tables=("roberta.embeddings.word_embeddings.weight",),
    lm_head="lm_head.decoder.weight",
    masked_lm_head="lm_head.dense.weight",
    head_bias_copy="lm_head.decoder.bias",
    prefix="roberta.",
    head_pattern=r"(lm_head|classifier)\.",
    unused_pattern=r"roberta\.pooler\..*",
)
XLM_ROBERTA = dataclasses.replace(
    ROBERTA,
    model_type="xlm-roberta",
    presets=(presets.xlm_roberta,),
    write=functools.partial(write_roberta, name="XLMRoberta"),
)
