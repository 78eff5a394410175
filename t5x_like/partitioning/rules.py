"""Which mesh axes a logical axis is split over: two tables, one for parameters and one for activations.

Model code names axes ("embed", "heads", ...) and nothing else. FSDP is the line `"embed": ("fsdp", "context")` of the
parameter table: parameters are stored split over the same devices that split the tokens, and gathered where they are
used, because the activation table leaves "embed" whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from t5x_like.config import ConfigError, PartitioningConfig, Problem
from t5x_like.config.partitioning import ContextAttention

AnyMesh = Mesh | AbstractMesh
"""Of a mesh the sizes of its axes are read, so that there need be no devices."""
MeshAxes = tuple[str, ...]
"""The mesh axes that split a dimension, outermost first; () leaves it whole."""
Table = Mapping[str, MeshAxes]
LogicalAxes = tuple[str | None, ...]
"""The logical name of each dimension of an array; None: always whole."""

PARAMETERS: Table = {
    "embed": ("fsdp", "context"),
    "vocab": ("tensor",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "experts": ("expert",),
    "head_dim": (),
    "layers": (),
    "router": (),
    "norm": (),
    "positions": (),
    "relative_buckets": (),
    "labels": (),
    "lora_rank": (),
}
ACTIVATIONS: Table = {
    "batch": ("data", "fsdp", "expert"),
    "expert_batch": ("data", "fsdp"),
    "length": ("context",),
    "residual_length": ("context", "tensor"),
    "capacity": ("context",),
    "embed": (),
    "vocab": ("tensor",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "experts": ("expert",),
    "head_dim": (),
    "positions": (),
}
"""What is not said by the names:

- Devices that share the experts ("expert") also share the batch; where tokens are with their experts, each has the rows
  of all of them, "expert_batch".
- "capacity" is the room of an expert for the tokens of a row.
- "residual_length" is the length of what is between the blocks: norms, dropout and sums need no whole row, so that the
  devices of "tensor" have a part of it each (sequence parallelism, Korthikanti et al. 2022).
- A token or position table that rows are looked up in counts as an activation, ("vocab", "embed"): gathered over fsdp
  first, or XLA would look up columns of rows that are split over the same axis and put them right at full size.
"""
MAY_STAY_WHOLE = frozenset({"kv_heads"})
"""Parameter axes that stay whole, without a complaint, where the mesh does not divide them: grouped and multi-query
attention has fewer key heads than a large tensor degree, and each device then keeps all of them."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """The two tables. The same name may be split in one and whole in the other."""

    parameters: Table
    activations: Table
    context_attention: ContextAttention = "ring"


def standard(config: PartitioningConfig) -> Rules:
    """The standard tables, with the pairs of the configuration in front.

    Raises:
      ConfigError: a pair for an unknown logical axis, or one that names no mesh axis.
    """
    found: list[Problem] = []

    def merged(table: Table, where: str, pairs: Sequence[tuple[str, str | None]]) -> Table:
        for name, axis in pairs:
            if name not in table:
                found.append(Problem(where, f"the logical axis '{name}'", f"one of {', '.join(table)}"))
            if axis is not None and axis not in config.degrees:
                found.append(Problem(where, f"the mesh axis '{axis}'", f"one of {', '.join(config.degrees)}, or None"))
        own: dict[str, MeshAxes] = {}
        for name, axis in pairs:
            own[name] = (*own.get(name, ()), *(() if axis is None else (axis,)))
        return {**table, **own}

    rules = Rules(
        parameters=merged(PARAMETERS, "partitioning.parameter_rules", config.parameter_rules),
        activations=merged(ACTIVATIONS, "partitioning.activation_rules", config.activation_rules),
        context_attention=config.context_attention,
    )
    if found:
        raise ConfigError(found)
    return rules


def split_axes(name: str | None, table: Table, size: int, mesh: AnyMesh) -> MeshAxes:
    """The mesh axes that split a dimension of `size`: as many of those in the table, outermost first, as divide it."""
    axes = _wanted(name, table, mesh)
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes


def spec(names: LogicalAxes, table: Table, shape: Sequence[int], mesh: AnyMesh) -> PartitionSpec:
    """How an array of `shape` is split over `mesh`.

    Mesh axes of one device are left out, and so are those that do not divide a dimension: right for an activation, and
    for a parameter `problems` reports it.

    Raises:
      ConfigError: a name without a rule, or a mesh axis twice in one array.
    """
    if len(names) != len(shape):
        raise ValueError(f"{len(names)} logical axes {names} for an array of shape {tuple(shape)}")
    found = _unknown(f"axes {names}", names, table)
    if found:
        raise ConfigError(found)
    dimensions = [split_axes(name, table, size, mesh) for name, size in zip(names, shape, strict=True)]
    found = _twice(f"axes {names}", [axis for axes in dimensions for axis in axes])
    if found:
        raise ConfigError(found)
    return PartitionSpec(*(None if not axes else axes[0] if len(axes) == 1 else axes for axes in dimensions))


def problems(path: str, names: LogicalAxes, table: Table, shape: Sequence[int], mesh: AnyMesh) -> list[Problem]:
    """All that is wrong with the partitioning of the parameter, or the part of optimizer state, at `path`."""
    if len(names) != len(shape):
        raise ValueError(f"{path}: {len(names)} logical axes {names} for an array of shape {tuple(shape)}")
    found = _unknown(path, names, table)
    if found:
        return found
    used: list[str] = []
    for name, size in zip(names, shape, strict=True):
        axes = split_axes(name, table, size, mesh)
        used += axes
        wanted = _wanted(name, table, mesh)
        if axes != wanted and name not in MAY_STAY_WHOLE:
            ways = math.prod(mesh.shape[axis] for axis in wanted)
            product = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in wanted)
            fix = f"choose other degrees, or leave the axis whole: partitioning.parameter_rules ('{name}', None)"
            found.append(Problem(f"{path}, axis {name}", str(size), f"a multiple of {ways} ({product})", fix))
    return found + _twice(path, used)


def _wanted(name: str | None, table: Table, mesh: AnyMesh) -> MeshAxes:
    return tuple(axis for axis in table[name] if mesh.shape[axis] > 1) if name is not None else ()


def _unknown(where: str, names: LogicalAxes, table: Table) -> list[Problem]:
    unknown = dict.fromkeys(name for name in names if name is not None and name not in table)
    expected = f"an axis that has a rule ({', '.join(table)})"
    return [Problem(where, f"the logical axis '{name}'", expected) for name in unknown]


def _twice(where: str, used: Sequence[str]) -> list[Problem]:
    twice = sorted({axis for axis in used if used.count(axis) > 1})
    return [Problem(where, f"mesh axis '{axis}' twice", "each mesh axis at most once per array") for axis in twice]
