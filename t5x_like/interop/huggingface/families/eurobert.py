"""EuroBERT: a stack of Llama's build that attends in both directions, with a head over the vocabulary."""

from __future__ import annotations

import dataclasses

from t5x_like.config.model import ModelConfig
from t5x_like.interop.huggingface.config_reader import Fields, write_rope
from t5x_like.interop.huggingface.families.family import Family, Present, SpecialTokens, Values
from t5x_like.interop.huggingface.families.llama import read_llama
from t5x_like.interop.huggingface.families.rotary_stack import rotary_stack_rules, write_rotary_stack
from t5x_like.interop.huggingface.weight_map import head_rule, table_rule
from t5x_like.models import presets

_RULES = [
    table_rule("model.embed_tokens.weight", "token_embedder"),
    head_rule(),
    *rotary_stack_rules(
        "model", "encoder", {"self_attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    ),
]


def read_eurobert(fields: Fields, present: Present) -> ModelConfig:
    epsilon = fields.number("rms_norm_eps", 1e-5)
    model = read_llama(fields.with_value("rms_norm_eps", epsilon), present)
    return dataclasses.replace(model, encoder=model.decoder, decoder=None)


def write_eurobert(model: ModelConfig) -> Values:
    stack = model.encoder
    assert stack is not None
    return {
        "architectures": ["EuroBertForMaskedLM"],
        **write_rotary_stack(stack, activation="hidden_act"),
        "rope_parameters": write_rope(stack.rope_base, stack.rope_scaling),
        "tie_word_embeddings": model.tie_embeddings,
        "vocab_size": model.vocab_size,
    }


EUROBERT = Family(
    model_type="eurobert",
    presets=(presets.eurobert,),
    rules=_RULES,
    read=read_eurobert,
    write=write_eurobert,
    special_tokens=SpecialTokens(pad=128_001, start=128_000, eos=128_001),
    architecture="encoder",
    token_tables=("model.embed_tokens.weight",),
    prefix="model.",
)
