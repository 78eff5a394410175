"""Switch Transformers: T5 with experts in every n-th layer, of which each token takes one."""

from __future__ import annotations

import dataclasses
from typing import Any

from t5x_like.config.model import ModelConfig, MoEConfig, StackConfig
from t5x_like.errors import DataError
from t5x_like.interop.huggingface.config_reader import Fields
from t5x_like.interop.huggingface.families.family import Present, Values
from t5x_like.interop.huggingface.families.t5 import T5, read_t5, t5_stack_rules, write_t5
from t5x_like.interop.huggingface.weight_map import Layers, Rule, head_rule, table_rule
from t5x_like.models import presets


def _stack_rules(stack: str, mlp: int) -> list[Rule]:
    """Return the rules of a stack, whose layers have an MLP or experts under the same beginning of a name."""
    tensors, params = f"{stack}.block.{{layer}}.layer.{mlp}.mlp", f"{stack}/layers"
    rules = [rule for rule in t5_stack_rules(stack, mlp) if "DenseReluDense" not in rule.tensor]
    # Without a period all layers have experts, which are then the stack's MLPs.
    places: tuple[tuple[str, Layers], ...] = ((f"{params}/experts", "with_experts"), (f"{params}/mlp", "all"))
    for experts, layers in places:
        rules.append(Rule(f"{tensors}.router.classifier.weight", (f"{experts}/router/kernel",), "out_in", 1, layers))
        for part in ("wi", "wo"):
            name, path = f"{tensors}.experts.expert_{{expert}}.{part}.weight", f"{experts}/{part}/kernel"
            rules.append(Rule(name, (path,), "out_in", 1, layers))
    for part in ("wi", "wo"):
        name, path = f"{tensors}.{part}.weight", f"{params}/mlp/{part}/kernel"
        rules.append(Rule(name, (path,), "out_in", 1, "without_experts"))
    return rules


def read_switch(fields: Fields, present: Present) -> ModelConfig:
    for name, expected in (
        ("router_bias", False),
        ("router_dtype", "float32"),
        ("router_ignore_padding_tokens", False),
    ):
        fields.only(name, expected)
    # The periods follow from the numbers of sparse layers; transformers computes nothing from the others.
    fields.unused("encoder_sparse_step", "decoder_sparse_step", "router_type", "add_router_probs", "num_partitions")
    # Experts have no dropout here.
    fields.unused("dropout_rate")
    model = read_t5(fields.with_value("dropout_rate", 0.0), present, default="relu")
    tied = fields.flag("tie_word_embeddings", True)
    stacks: dict[str, Any] = {
        name: dataclasses.replace(stack, experts=_experts(fields, f"num_sparse_{name}_layers", stack))
        for name, stack in model.stacks.items()
    }
    if model.encoder is not None and model.encoder.mlp_gated:
        raise fields.wrong("feed_forward_proj", "an MLP without a gate")
    return dataclasses.replace(model, scale_logits=tied, **stacks)


def _experts(fields: Fields, number: str, stack: StackConfig) -> MoEConfig:
    sparse = fields.numbered(number, 3)
    period = stack.num_layers // sparse if sparse else 0
    # The period is 0 also if there are more such layers than layers.
    if not period or stack.num_layers % period or stack.num_layers // period != sparse:
        raise fields.wrong(number, f"a divisor of the {stack.num_layers} layers")
    return MoEConfig(
        num_experts=fields.numbered("num_experts", 8),
        experts_per_token=1,
        layer_period=period,
        capacity=fields.integer("expert_capacity", 64),
        normalize_weights=False,
        router_aux_loss_weight=fields.number("router_aux_loss_coef", 0.001),
        router_z_loss_weight=fields.number("router_z_loss_coef", 0.001),
    )


def write_switch(model: ModelConfig) -> Values:
    encoder, decoder = model.encoder, model.decoder
    assert encoder is not None and decoder is not None and encoder.experts is not None
    if encoder.experts.capacity is None:
        raise DataError("Switch Transformers' config.json has no experts without a capacity (experts.capacity)")
    values = write_t5(model, architecture="SwitchTransformersForConditionalGeneration")
    return {
        **{name: value for name, value in values.items() if name not in ("feed_forward_proj", "scale_decoder_outputs")},
        "dense_act_fn": values["feed_forward_proj"],
        "num_sparse_encoder_layers": len(encoder.expert_layers),
        "num_sparse_decoder_layers": len(decoder.expert_layers),
        "num_experts": encoder.experts.num_experts,
        "expert_capacity": encoder.experts.capacity,
        "router_aux_loss_coef": encoder.experts.router_aux_loss_weight,
        "router_z_loss_coef": encoder.experts.router_z_loss_weight,
        "router_bias": False,
        "router_dtype": "float32",
    }


SWITCH = dataclasses.replace(
    T5,
    model_type="switch_transformers",
    presets=(presets.switch,),
    rules=[table_rule("shared.weight", "token_embedder"), head_rule(), *_stack_rules("encoder", 1)]
    + _stack_rules("decoder", 2),
    read=read_switch,
    write=write_switch,
    has_experts=True,
)
