"""Qwen 2 (and 2.5) and Qwen 3: Llama with biases of queries, keys and values, or with normalized queries and keys."""

from __future__ import annotations

import dataclasses
import functools

from t5x_like.config.model import ModelConfig
from t5x_like.interop.huggingface.config_reader import Fields, write_layer_types
from t5x_like.interop.huggingface.families.family import Present, Values
from t5x_like.interop.huggingface.families.gemma import causal_window
from t5x_like.interop.huggingface.families.llama import LLAMA, read_llama, write_llama
from t5x_like.interop.huggingface.families.mistral import with_causal_window
from t5x_like.models import presets


def read_qwen(fields: Fields, present: Present, *, qkv_bias: bool) -> ModelConfig:
    """Return the model of a config.json.

    Args:
      fields: config.json.
      present: Facts from the tensors.
      qkv_bias: Qwen 2: queries, keys and values have biases. Otherwise queries and keys are normalized.
    """
    model = read_llama(fields, present)
    stack = model.decoder
    assert stack is not None
    stack = dataclasses.replace(stack, qkv_bias=qkv_bias, qk_norm=not qkv_bias)
    fields.unused("sliding_window", "max_window_layers")
    if not fields.flag("use_sliding_window", False):
        if set(fields.values.get("layer_types") or ()) - {"full_attention"}:
            raise fields.wrong("layer_types", "full_attention, as use_sliding_window is false")
    else:
        # Without `layer_types`, the first layers have full attention.
        num_full = fields.integer("max_window_layers", 28)
        kinds = ["full_attention" if layer < num_full else "sliding_attention" for layer in range(stack.num_layers)]
        named = Fields({"layer_types": fields.values.get("layer_types") or kinds}, fields.where)
        pattern = named.layer_kinds(stack.num_layers, full_every=1, first_full=0)
        stack = dataclasses.replace(stack, layer_pattern=pattern)
        stack = with_causal_window(stack, fields.integer("sliding_window", 4096))
    return dataclasses.replace(model, decoder=stack)


def write_qwen(model: ModelConfig, *, architecture: str) -> Values:
    """Return the fields of config.json; `architecture` is the class name in transformers."""
    stack = model.decoder
    assert stack is not None
    has_window = "local" in stack.layer_kinds
    return {
        **write_llama(model),
        "architectures": [architecture],
        "use_sliding_window": has_window,
        "sliding_window": causal_window(stack) if has_window else None,
        "layer_types": write_layer_types(stack.layer_kinds),
    }


QWEN_2 = dataclasses.replace(
    LLAMA,
    model_type="qwen2",
    presets=(presets.qwen_2_5,),
    read=functools.partial(read_qwen, qkv_bias=True),
    write=functools.partial(write_qwen, architecture="Qwen2ForCausalLM"),
)
QWEN_3 = dataclasses.replace(
    LLAMA,
    model_type="qwen3",
    presets=(presets.qwen_3,),
    read=functools.partial(read_qwen, qkv_bias=False),
    write=functools.partial(write_qwen, architecture="Qwen3ForCausalLM"),
)
