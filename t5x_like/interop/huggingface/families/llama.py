"""Llama."""

from __future__ import annotations

from t5x_like.config.model import ModelConfig
from t5x_like.interop.huggingface.config_reader import Fields, write_rope
from t5x_like.interop.huggingface.families.family import Family, Present, SpecialTokens, Values
from t5x_like.interop.huggingface.families.rotary_stack import (
    read_rotary_stack,
    rotary_stack_rules,
    write_rotary_stack,
)
from t5x_like.interop.huggingface.weight_map import head_rule, table_rule
from t5x_like.models import presets

RULES = [
    table_rule("model.embed_tokens.weight", "token_embedder"),
    head_rule(),
    *rotary_stack_rules(
        "model", "decoder", {"self_attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    ),
]
TOKENS = SpecialTokens(pad=None, start=1, eos=2)


def read_llama(fields: Fields, present: Present) -> ModelConfig:
    base, scaling = fields.rope(10_000.0)
    return ModelConfig(
        encoder=None,
        decoder=read_rotary_stack(
            fields, activation="hidden_act", default="silu", epsilon=1e-6, rope_base=base, rope_scaling=scaling
        ),
        vocab_size=fields.integer("vocab_size"),
        tie_embeddings=not present.head,
        embedding_stddev=0.02,
    )


def write_llama(model: ModelConfig) -> Values:
    stack = model.decoder
    assert stack is not None
    return {
        "architectures": ["LlamaForCausalLM"],
        **write_rotary_stack(stack, activation="hidden_act"),
        "rope_parameters": write_rope(stack.rope_base, stack.rope_scaling),
        "tie_word_embeddings": model.tie_embeddings,
        "vocab_size": model.vocab_size,
    }


LLAMA = Family(
    model_type="llama",
    presets=(presets.llama_3, presets.decoder_1b),
    rules=RULES,
    read=read_llama,
    write=write_llama,
    special_tokens=TOKENS,
    architecture="decoder",
    token_tables=("model.embed_tokens.weight",),
    prefix="model.",
    ties_by_default=False,
)
