"""Exact parameter counts by part of the model, from the program's own parameter tree, with their bytes on a device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import jax

from t5x_like.config.model import ModelConfig
from t5x_like.models.factory import abstract_model
from t5x_like.planning.estimate.memory import leaf_bytes
from t5x_like.program import Program
from t5x_like.sharding.shardings import LogicalArray, logical_leaves
from t5x_like.utils import tree_paths

_KINDS = {
    "self_attention": "attention",
    "cross_attention": "cross-attention",
    "mlp": "MLP",
    "relative_bias": "positions",
    "global_relative_bias": "positions",
    "position_embedder": "positions",
    "distance_embedder": "positions",
    "depth_weights": "depth weights",
    "token_type_embedder": "token types",
    "embedding_projection": "embedding projection",
}
_PADDING = "vocabulary padding"
_TABLES = {
    "token_embedder": "embedding",
    "encoder_token_embedder": "encoder embedding",
    "unscaled_embedding": "embedding",
}


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Parameters of one part of a model.

    Attributes:
      count: Number of all parameters.
      active: Number of parameters that one token uses: fewer than `count` in a mixture of experts, 0 for padding.
      bytes_per_device: Bytes of the parameters alone.
    """

    count: int
    active: int
    bytes_per_device: int


def parameter_parts(program: Program) -> dict[str, ParameterCount]:
    """Count the parameters by part.

    The parts are the embedding; of each stack attention, cross-attention, MLP or experts, positions and norms; the
    head; and the padding of the vocabulary in tables and head, if there is any. A tied table is counted once, as
    embedding. The sum of `count` is the number of parameters.
    """
    params = program.abstract_params if program.lora is None else program.abstract_base_params
    leaves = logical_leaves(program.spec.logical_axes, params)
    if program.lora is None or not program.lora.quantized:
        return _parts(program.run.model, leaves, lambda leaf: leaf_bytes(leaf.array))
    kept = {
        leaf.path: sum(map(leaf_bytes, jax.tree.leaves(tree_paths.at(program.abstract_base, leaf.path))))
        for leaf in leaves
    }
    return _parts(program.run.model, leaves, lambda leaf: kept[leaf.path])


def model_parts(model: ModelConfig) -> dict[str, ParameterCount]:
    """Count the parameters of a model that belongs to no run, by the parts of `parameter_parts`.

    `bytes_per_device` assumes float32 parameters on one device.
    """
    spec = abstract_model(model)
    leaves = logical_leaves(spec.logical_axes, spec.params)
    return _parts(model, leaves, lambda leaf: math.prod(leaf.array.shape) * leaf.array.dtype.itemsize)


def _parts(
    model: ModelConfig, leaves: Iterable[LogicalArray], bytes_of: Callable[[LogicalArray], int]
) -> dict[str, ParameterCount]:
    parts: dict[str, ParameterCount] = {}

    def add(name: str, more: ParameterCount) -> None:
        parts[name] = total({"before": parts[name], "more": more}) if name in parts else more

    rows, padding = model.padded_vocab_size, model.vocab_padding_rows
    for leaf in leaves:
        count, size = math.prod(leaf.array.shape), bytes_of(leaf)
        # No token uses the zeros of a padded table.
        unused, unused_size = (x * padding // rows if "vocab" in leaf.axes else 0 for x in (count, size))
        active = _active(count - unused, leaf.path, leaf.axes, model)
        add(part_of(leaf.path, leaf.axes), ParameterCount(count - unused, active, size - unused_size))
        if unused:
            add(_PADDING, ParameterCount(unused, 0, unused_size))
    return parts


def part_of(path: str, axes: tuple[str | None, ...]) -> str:
    """Return the part that a parameter belongs to, by its path in the tree."""
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
    if inner[0] in ("mlp", "experts") and inner[1] in ("router", "router_bias"):
        return f"{stack} router"
    return f"{stack} {_KINDS.get(inner[0], 'norms')}"


def _active(count: int, path: str, axes: tuple[str | None, ...], model: ModelConfig) -> int:
    stack = {**model.stacks, "generator": model.generator}.get(path.split("/")[0])
    if "experts" not in axes or stack is None or stack.experts is None:
        return count
    return count * stack.experts.experts_per_token // stack.experts.num_experts


def total(parts: Mapping[str, ParameterCount]) -> ParameterCount:
    """Return the sum of the parts."""
    return ParameterCount(
        sum(part.count for part in parts.values()),
        sum(part.active for part in parts.values()),
        sum(part.bytes_per_device for part in parts.values()),
    )


def cross_attention_share(parts: Mapping[str, ParameterCount]) -> float:
    """Return the parameters of cross-attention as a fraction of all others; 0 without cross-attention."""
    cross = sum(part.count for name, part in parts.items() if name.endswith("cross-attention"))
    return cross / max(total(parts).count - cross, 1)
