"""Mistral: Llama, of whose releases some attend within a window in all layers."""

from __future__ import annotations

import dataclasses

from t5x_like.config.model import ModelConfig, StackConfig
from t5x_like.interop.huggingface.config_reader import Fields
from t5x_like.interop.huggingface.families.family import Present, Values
from t5x_like.interop.huggingface.families.llama import LLAMA, read_llama, write_llama
from t5x_like.models import presets


def with_causal_window(stack: StackConfig, window: int) -> StackConfig:
    """Return a stack whose local layers attend to `window` tokens, including the query's own. All layers have the same
    rotary positions."""
    return dataclasses.replace(stack, sliding_window=(window - 1, window - 1), local_rope_scaling=stack.rope_scaling)


def read_mistral(fields: Fields, present: Present) -> ModelConfig:
    model = read_llama(fields, present)
    assert model.decoder is not None
    if fields.values.get("sliding_window", 4096) is None:
        return model
    stack = dataclasses.replace(model.decoder, layer_pattern=("local",))
    return dataclasses.replace(model, decoder=with_causal_window(stack, fields.integer("sliding_window", 4096)))


def write_mistral(model: ModelConfig) -> Values:
    stack = model.decoder
    assert stack is not None
    window = stack.sliding_window if set(stack.layer_kinds) == {"local"} else None
    return {
        **write_llama(model),
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None if window is None else window[0] + 1,
    }


MISTRAL = dataclasses.replace(
    LLAMA, model_type="mistral", presets=(presets.mistral_7b,), read=read_mistral, write=write_mistral
)
