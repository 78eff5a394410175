"""The large activations of a run by name, for checks and the choice of a mesh: what models constrain, with shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from t5x_like.config import RunConfig, StackConfig, batch_spec
from t5x_like.partitioning.rules import LogicalAxes


class Activation(NamedTuple):
    """An array of one layer, or of the head, for one part of a batch.

    Attributes:
      path: Sub-batch, stack and name.
      axes: Logical axes.
      shape: Of the whole array, for the rows of one accumulation step.
      itemsize: Bytes of an element.
    """

    path: str
    axes: LogicalAxes
    shape: tuple[int, ...]
    itemsize: int


def activations(run: RunConfig) -> list[Activation]:
    """The activations of a training step whose size grows with the batch, sub-batch by sub-batch."""
    found: list[Activation] = []
    for name, features in batch_spec(run).items():
        for stack_name, stack in run.model.stacks.items():
            tokens = features.get(f"{stack_name}_input_tokens")
            if tokens is None:
                continue
            rows, length = tokens.shape
            rows //= run.training.gradient_accumulation_steps
            found += _of_stack(f"{name}/{stack_name}", stack, rows, length, 2 if run.model.dtype == "bfloat16" else 4)
            if f"{stack_name}_target_tokens" in features:
                shape = (rows, length, run.model.vocab_size)
                found.append(Activation(f"{name}/logits", ("batch", "length", "vocab"), shape, 4))
    return found


def _of_stack(path: str, stack: StackConfig, rows: int, length: int, itemsize: int) -> Iterator[Activation]:
    states = (rows, length, stack.d_model)
    yield Activation(f"{path}/residual", ("batch", "residual_length", "embed"), states, itemsize)
    yield Activation(f"{path}/block_input", ("batch", "length", "embed"), states, itemsize)
    for name, axis, heads in (("query", "heads", stack.num_heads), ("key", "kv_heads", stack.num_kv_heads)):
        shape = (rows, length, heads, stack.head_dim)
        yield Activation(f"{path}/{name}", ("batch", "length", axis, "head_dim"), shape, itemsize)
    if stack.experts is None:
        yield Activation(f"{path}/mlp", ("batch", "length", "mlp"), (rows, length, stack.d_ff), itemsize)
        return
    count = stack.experts.num_experts
    if stack.experts.capacity_factor is None:
        axes: LogicalAxes = ("expert_batch", "length", "experts", "mlp")
        yield Activation(f"{path}/experts", axes, (rows, length, count, stack.d_ff), itemsize)
        return
    room = min(length, math.ceil(stack.experts.capacity_factor * length * stack.experts.experts_per_token / count))
    axes = ("expert_batch", "experts", "capacity", "mlp")
    yield Activation(f"{path}/experts", axes, (rows, count, room, stack.d_ff), itemsize)
