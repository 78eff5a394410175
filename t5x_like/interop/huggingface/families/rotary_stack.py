"""Stacks of the build that Llama, Mixtral and the Gemmas share: config.json and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from t5x_like.config.model import StackConfig
from t5x_like.interop.huggingface.config_reader import Fields, write_original_positions
from t5x_like.interop.huggingface.families.family import Values, activation_name
from t5x_like.interop.huggingface.weight_map import Rule, attention_rules, dense_rules, norm_rules

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Names of query, key, value and output projection."""


def _gated(tensors: str, params: str) -> list[Rule]:
    names = {"gate_proj": "wi_0", "up_proj": "wi_1", "down_proj": "wo"}
    return [rule for name, part in names.items() for rule in dense_rules(f"{tensors}.{name}", f"{params}/{part}")]


def rotary_stack_rules(tensors: str, params: str, norms: Mapping[str, str]) -> list[Rule]:
    """Return the rules of a stack.

    Args:
      tensors: Beginning of the names of its tensors.
      params: Path of its parameters.
      norms: Name of each norm's tensor by the name of its parameter.
    """
    layer, layers = f"{tensors}.layers.{{layer}}", f"{params}/layers"
    rules = attention_rules(f"{layer}.self_attn", f"{layers}/self_attention", PROJECTIONS)
    rules += norm_rules(f"{layer}.self_attn.q_norm", f"{layers}/self_attention/query_norm")
    rules += norm_rules(f"{layer}.self_attn.k_norm", f"{layers}/self_attention/key_norm")
    rules += _gated(f"{layer}.mlp", f"{layers}/mlp")
    for norm, name in norms.items():
        rules += norm_rules(f"{layer}.{name}", f"{layers}/{norm}")
    return [*rules, *norm_rules(f"{tensors}.norm", f"{params}/final_norm")]


def read_rotary_stack(fields: Fields, *, activation: str, default: str, epsilon: float, **more: Any) -> StackConfig:
    """Return the stack that config.json describes.

    Args:
      fields: config.json, or its part for the stack.
      activation: Name of the field of the activation.
      default: Activation if the field is missing.
      epsilon: Epsilon of the norms if the field is missing.
      more: Further fields of `StackConfig`.
    """
    heads, width = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    if activation == "hidden_activation":
        # Published files of Gemma 2 have both fields, and transformers does not read this one.
        fields.unused("hidden_act")
    if fields.flag("use_bidirectional_attention", False):
        raise fields.wrong("use_bidirectional_attention", "false: nothing else is supported")
    values: dict[str, Any] = {
        "num_layers": fields.numbered("num_hidden_layers"),
        "d_model": width,
        "num_heads": heads,
        "num_kv_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": fields.integer("head_dim", width // max(heads, 1)),
        "d_ff": fields.integer("intermediate_size"),
        "mlp_activation": fields.activation(activation, default),
        "norm_epsilon": fields.number("rms_norm_eps", epsilon),
        "positions": "rope",
    }
    return StackConfig(**(values | more))


def write_rotary_stack(stack: StackConfig, *, activation: str) -> Values:
    """Return the fields of config.json that describe a stack; `activation` is the name of the activation's field."""
    return {
        "hidden_size": stack.d_model,
        "intermediate_size": stack.d_ff,
        "num_hidden_layers": stack.num_layers,
        "num_attention_heads": stack.num_heads,
        "num_key_value_heads": stack.num_kv_heads,
        "head_dim": stack.head_dim,
        activation: activation_name(stack.mlp_activation),
        "rms_norm_eps": stack.norm_epsilon,
        **write_original_positions(stack.rope_scaling, stack.local_rope_scaling),
    }
