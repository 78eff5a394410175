"""Parameters by part, exactly: counted in the program's own tree, with the bytes of them on a device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from t5x_like.config.model import ModelConfig
from t5x_like.partitioning.shardings import leaves
from t5x_like.planning.memory import leaf_bytes
from t5x_like.program import Program

Tree = Any

_KINDS = {
    "self_attention": "attention",
    "cross_attention": "cross-attention",
    "mlp": "MLP",
    "relative_bias": "positions",
    "position_embedder": "positions",
    "distance_embedder": "positions",
    "token_type_embedder": "token types",
    "embedding_projection": "embedding projection",
}
_TABLES = {
    "token_embedder": "embedding",
    "encoder_token_embedder": "encoder embedding",
    "unscaled_embedding": "embedding",
}


@dataclasses.dataclass(frozen=True)
class Part:
    """Parameters of one part of a model.

    Attributes:
      count: Of all.
      active: Of those that one token goes through: fewer than `count` in a mixture of experts.
      bytes_per_device: Of the parameters alone.
    """

    count: int
    active: int
    bytes_per_device: int


def parameter_parts(program: Program) -> dict[str, Part]:
    """By part: embedding; of each stack attention, cross-attention, MLP or experts, positions and norms; head. A tied
    table is counted once, as embedding. The sum of `count` is the number of parameters."""
    model = program.run.model
    placed = program.abstract_params if program.adaptation is None else program.abstract_base
    total: dict[str, Part] = {}
    for leaf in leaves(program.spec.logical_axes, placed):
        name = part_of(leaf.path, leaf.axes)
        count = math.prod(leaf.array.shape)
        old = total.get(name, Part(0, 0, 0))
        total[name] = Part(
            old.count + count,
            old.active + _active(count, leaf.path, leaf.axes, model),
            old.bytes_per_device + leaf_bytes(leaf.array),
        )
    return total


def part_of(path: str, axes: tuple[str | None, ...]) -> str:
    """The part that a parameter belongs to, by its path in the tree."""
    names = path.split("/")
    if names[0] in _TABLES:
        return _TABLES[names[0]]
    if names[0] == "head":
        return "head"
    stack = names[0]
    inner = [name for name in names[1:] if name not in ("layers", "encoder")]
    if stack == "generator" and inner[0] == "head":
        return "generator head"
    if "experts" in axes:
        return f"{stack} experts"
    if inner[0] == "mlp" and inner[1] == "router":
        return f"{stack} router"
    return f"{stack} {_KINDS.get(inner[0], 'norms')}"


def _active(count: int, path: str, axes: tuple[str | None, ...], model: ModelConfig) -> int:
    stack = {**model.stacks, "generator": model.generator}.get(path.split("/")[0])
    if "experts" not in axes or stack is None or stack.experts is None:
        return count
    return count * stack.experts.experts_per_token // stack.experts.num_experts


def total(parts: Mapping[str, Part]) -> Part:
    """The sum of parts."""
    return Part(
        sum(part.count for part in parts.values()),
        sum(part.active for part in parts.values()),
        sum(part.bytes_per_device for part in parts.values()),
    )


def cross_attention_share(parts: Mapping[str, Part]) -> float:
    """Parameters of cross-attention as a share of all others; 0 without it."""
    cross = sum(part.count for name, part in parts.items() if name.endswith("cross-attention"))
    return cross / max(total(parts).count - cross, 1)
