"""The attention of each stack: what it asks of its backend, and the backend that runs it on the devices of a mesh.

Model code, estimates and reports all ask here, so that they agree on the backend of `ModelConfig.attention = "auto"`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from t5x_like.config.batch_spec import ArraySpec
from t5x_like.config.model import ModelConfig, Positions, StackConfig
from t5x_like.kernels.attention import AUTO, get_backend
from t5x_like.kernels.attention_backend import AttentionRequest, BiasKind, drops_values
from t5x_like.kernels.attention_masks import SequenceSplit
from t5x_like.kernels.auto_attention import choose
from t5x_like.sharding.rules import AnyMesh, Rules

_BIASES: dict[Positions, BiasKind] = {
    "relative_bias": "relative",
    "disentangled": "content",
    "rope": "none",
    "learned": "none",
    "none": "none",
}


class AttentionUse(NamedTuple):
    """One of the attentions that a model computes.

    Attributes:
      stack: Name of the stack: "encoder", "decoder" or "generator".
      is_cross: Cross-attention, and not the self-attention of the stack.
      request: Properties of the attention.
    """

    stack: str
    is_cross: bool
    request: AttentionRequest


def attention_request(
    stack: StackConfig,
    dtype: str,
    *,
    q_length: int = 0,
    source_length: int = 0,
    is_cross: bool = False,
    is_merged: bool = False,
    split: SequenceSplit | None = None,
) -> AttentionRequest:
    """Return what an attention of a stack asks of its backend, without the properties of its mask.

    It is the same with and without dropout, so that a model is evaluated with the backend that it is trained with.

    Args:
      stack: The stack.
      dtype: Type of the activations.
      q_length: Length of the stack's own sequence; 0: not known.
      source_length: Length of the encoder's sequence, for cross-attention and merged attention.
      is_cross: The attention is cross-attention.
      is_merged: The self-attention also reads the encoder's states.
      split: Split of the sequence over devices, or None.
    """
    dropped_as_values = drops_values(stack.num_heads, stack.num_kv_heads, stack.dropout_broadcast_length)
    return AttentionRequest(
        num_heads=stack.num_heads,
        num_kv_heads=stack.num_kv_heads,
        head_dim=stack.head_dim,
        dtype=dtype,
        bias="none" if is_cross else _BIASES[stack.positions],
        softcap=stack.attention_softcap,
        dropout_rate=0.0 if dropped_as_values else stack.dropout_rate,
        dynamic_window=not is_cross and len(set(stack.layer_kinds)) > 1,
        split=split,
        is_merged=is_merged,
        q_length=q_length,
        kv_length=source_length if is_cross else q_length + (source_length if is_merged else 0),
    )


def can_split_sequence(stack: StackConfig) -> bool:
    """Return whether each device can attend with its own queries and the keys of one device at a time.

    The bias of disentangled positions has the size of the scores, and sums of blocks are not split.
    """
    return stack.positions != "disentangled" and stack.global_block_size is None


def attention_uses(
    model: ModelConfig, features: Mapping[str, ArraySpec] | None = None, *, split: SequenceSplit | None = None
) -> Iterator[AttentionUse]:
    """Yield the attentions of a model, for a sub-batch or for sequences of unknown lengths.

    Args:
      model: The model.
      features: Shapes of the sub-batch.
      split: Split of the sequences over devices, or None.
    """
    features = features or {}

    def length(stack: str) -> int:
        tokens = features.get(f"{stack}_input_tokens")
        return 0 if tokens is None else tokens.shape[1]

    for name, stack in [*model.stacks.items(), ("generator", model.generator)]:
        if stack is None:
            continue
        has_source = name == "decoder" and model.encoder is not None
        is_merged = (has_source and stack.cross_attention == "merged") or stack.global_block_size is not None

        def request(stack: StackConfig, name: str, **kind: bool) -> AttentionRequest:
            q_length = length("encoder" if name == "generator" else name)
            return attention_request(
                stack,
                model.dtype,
                q_length=q_length,
                source_length=stack.num_blocks(q_length) or length("encoder"),
                split=split if can_split_sequence(stack) else None,
                **kind,
            )

        has_prefix = name == "decoder" and "decoder_causal_attention" in features
        own = dataclasses.replace(request(stack, name, is_merged=is_merged), has_prefix=has_prefix)
        yield AttentionUse(name, False, own)
        if has_source and not is_merged:
            yield AttentionUse(name, True, request(stack, name, is_cross=True))


def sequence_split_of(mesh: AnyMesh, rules: Rules) -> SequenceSplit | None:
    """Return how a mesh splits sequences over devices; None if each device has whole ones."""
    devices = math.prod(mesh.shape[axis] for axis in rules.activations["length"])
    return SequenceSplit(rules.context_attention, devices) if devices > 1 else None


def describe_attention(
    model: ModelConfig, features: Mapping[str, Mapping[str, ArraySpec]], platform: str, *, split: SequenceSplit | None
) -> str:
    """Return the backend of each attention in words, with the reasons for which preferred ones were passed over.

    Args:
      model: The model.
      features: Shapes of each sub-batch by name.
      platform: Platform of the devices.
      split: Split of the sequences over devices, or None.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for shapes in features.values():
        for use in attention_uses(model, shapes, split=split):
            choice = choose(model.attention, platform, use.request)
            not_chosen = "; ".join(f"not {name}: {reason}" for name, reason in choice.passed_over)
            uses = found.setdefault((choice.backend, not_chosen), [])
            name = f"{use.stack} {'cross-attention' if use.is_cross else 'self-attention'}"
            if name not in uses:
                uses.append(name)
    return ", ".join(
        f"{backend} for {' and '.join(uses)}{f' ({reasons})' if reasons else ''}"
        for (backend, reasons), uses in found.items()
    )


def attention_for_platform(model: ModelConfig, platform: str) -> ModelConfig:
    """Return the model with "auto" in place of a backend whose kernels are for devices of another platform."""
    if model.attention == AUTO or get_backend(model.attention).platform in (None, platform):
        return model
    return dataclasses.replace(model, attention=AUTO)
