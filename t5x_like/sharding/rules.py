"""Logical axis rules: the mesh axes that split each logical axis, one table for parameters and one for activations.

Model code names logical axes ("embed", "heads", ...) and nothing else. FSDP is the line `"embed": ("fsdp", "context")`
of the parameter table: parameters are stored split over the devices that split the tokens. They are gathered where they
are used, because the activation table leaves "embed" whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence, Set

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from t5x_like.config import ShardingConfig
from t5x_like.config.sharding import ContextAttention
from t5x_like.errors import ConfigError, ConfigProblem

AnyMesh = Mesh | AbstractMesh
"""Only the axis sizes of a mesh are read, so no devices are needed."""
MeshAxes = tuple[str, ...]
"""The mesh axes that split a dimension, outermost first; () leaves it whole."""
Table = Mapping[str, MeshAxes]
LogicalAxes = tuple[str | None, ...]
"""Logical name of each dimension of an array; None for a dimension that is never split."""

PARAMETERS: Table = {
    # FSDP: every parameter with an "embed" dimension is stored split and gathered where a layer uses it.
    "embed": ("fsdp", "context"),
    "vocab": ("tensor",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "experts": ("expert",),
    "head_dim": (),
    "layers": (),
    "router": (),
    # Vectors of norms and small tables stay whole: gathering them would cost more than it saves.
    "norm": (),
    "positions": (),
    "relative_buckets": (),
    "labels": (),
    "lora_rank": (),
}
ACTIVATIONS: Table = {
    # "fsdp" splits rows as well as parameters. Otherwise the devices that share a parameter would all compute the same
    # rows.
    "batch": ("data", "fsdp", "expert"),
    "length": ("context",),
    "residual_length": ("context", "tensor"),
    "embed": (),
    "vocab": ("tensor",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "experts": ("expert",),
    "head_dim": (),
    "matrices": ("fsdp", "context"),
}
"""Conventions of the activation table:

- Devices that share the experts ("expert") also split the batch; tokens travel to their experts and back
  (`kernels.expert_dispatch`).
- "residual_length" is the length of the arrays between the blocks. Norms, dropout and residual sums do not need a whole
  row, so each device of "tensor" holds a part of it (sequence parallelism, Korthikanti et al. 2022).
- A table from which rows are looked up is split as the parameter table says (`kernels.table_lookup`). If XLA
  partitioned the lookup, it would reshard the result at full size.
- "matrices" are the layers of a stack while the optimizer computes with their matrices (Muon).
"""
MAY_STAY_WHOLE = frozenset({"kv_heads"})
"""Parameter axes that may stay whole, without an error, if the mesh does not divide them: grouped-query and multi-query
attention has fewer key heads than a large tensor degree, and each device then keeps all of them."""
FOREIGN_MAY_STAY_WHOLE = MAY_STAY_WHOLE | {"vocab"}
"""The same for the parameters of another model than the run's, a teacher or the source of a warm start, whose
vocabulary need not be padded for this mesh."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """Both tables. The same logical axis may be split in one table and whole in the other."""

    parameters: Table
    activations: Table
    context_attention: ContextAttention = "ring"


def default_rules(config: ShardingConfig) -> Rules:
    """Return the standard tables, overridden by the pairs of the configuration.

    Raises:
      ConfigError: A pair names an unknown logical axis or an unknown mesh axis.
    """
    errors: list[ConfigProblem] = []

    def merged(table: Table, where: str, pairs: Sequence[tuple[str, str | None]]) -> Table:
        for name, axis in pairs:
            if name not in table:
                errors.append(ConfigProblem(where, f"the logical axis '{name}'", f"one of {', '.join(table)}"))
            if axis is not None and axis not in config.degrees:
                errors.append(
                    ConfigProblem(where, f"the mesh axis '{axis}'", f"one of {', '.join(config.degrees)}, or None")
                )
        # Pairs of one axis add up, ("embed", "fsdp") and ("embed", "tensor") split it over both. They replace the
        # default rule; a single pair with None leaves the axis whole.
        overrides: dict[str, MeshAxes] = {}
        for name, axis in pairs:
            overrides[name] = (*overrides.get(name, ()), *(() if axis is None else (axis,)))
        return {**table, **overrides}

    rules = Rules(
        parameters=merged(PARAMETERS, "sharding.parameter_rules", config.parameter_rules),
        activations=merged(ACTIVATIONS, "sharding.activation_rules", config.activation_rules),
        context_attention=config.context_attention,
    )
    if errors:
        raise ConfigError(errors)
    return rules


def split_axes(name: str | None, table: Table, size: int, mesh: AnyMesh) -> MeshAxes:
    """Return the mesh axes that split a dimension of `size`: the longest prefix of its rule that divides it."""
    axes = _rule(name, table, mesh)
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        # Shortened from the right: mesh axes are listed outermost first, so the rest still splits into contiguous
        # parts.
        axes = axes[:-1]
    return axes


def spec(names: LogicalAxes, table: Table, shape: Sequence[int], mesh: AnyMesh) -> PartitionSpec:
    """Return the partition specification of an array of `shape` on `mesh`.

    Mesh axes of size 1 are left out, and so are those that do not divide a dimension. For an activation that is
    correct; for a parameter `problems` reports it.

    Raises:
      ConfigError: A name has no rule, or a mesh axis splits the array twice.
    """
    if len(names) != len(shape):
        raise ValueError(f"{len(names)} logical axes {names} for an array of shape {tuple(shape)}")
    errors = _unknown(f"axes {names}", names, table)
    if errors:
        raise ConfigError(errors)
    dimensions = [split_axes(name, table, size, mesh) for name, size in zip(names, shape, strict=True)]
    # A mesh axis can number the parts of one dimension only.
    errors = _repeated(f"axes {names}", [axis for axes in dimensions for axis in axes])
    if errors:
        raise ConfigError(errors)
    return PartitionSpec(*(None if not axes else axes[0] if len(axes) == 1 else axes for axes in dimensions))


def problems(
    path: str,
    names: LogicalAxes,
    table: Table,
    shape: Sequence[int],
    mesh: AnyMesh,
    *,
    may_stay_whole: Set[str] = MAY_STAY_WHOLE,
) -> list[ConfigProblem]:
    """Return all problems of the sharding of the parameter, or the array of optimizer state, at `path`."""
    if len(names) != len(shape):
        raise ValueError(f"{path}: {len(names)} logical axes {names} for an array of shape {tuple(shape)}")
    errors = _unknown(path, names, table)
    if errors:
        return errors
    used: list[str] = []
    for name, size in zip(names, shape, strict=True):
        axes = split_axes(name, table, size, mesh)
        used += axes
        # For an activation, a dimension that does not divide stays whole without an error. A parameter that stays whole
        # costs memory on every device, so that it is reported.
        wanted = _rule(name, table, mesh)
        if axes != wanted and name not in may_stay_whole:
            shards = math.prod(mesh.shape[axis] for axis in wanted)
            product = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in wanted)
            fix = f"choose other degrees, or leave the axis whole: sharding.parameter_rules ('{name}', None)"
            if name == "vocab":
                fix = f"set model.pad_vocab_to_multiple_of to a multiple of {shards}, or {fix}"
            errors.append(ConfigProblem(f"{path}, axis {name}", str(size), f"a multiple of {shards} ({product})", fix))
    return errors + _repeated(path, used)


def _rule(name: str | None, table: Table, mesh: AnyMesh) -> MeshAxes:
    """Return the mesh axes of a logical axis, without those of size 1."""
    # Axes of size 1 split nothing; without them a small mesh gives the same specifications as no mesh.
    return tuple(axis for axis in table[name] if mesh.shape[axis] > 1) if name is not None else ()


def _unknown(where: str, names: LogicalAxes, table: Table) -> list[ConfigProblem]:
    unknown = dict.fromkeys(name for name in names if name is not None and name not in table)
    expected = f"an axis that has a rule ({', '.join(table)})"
    return [ConfigProblem(where, f"the logical axis '{name}'", expected) for name in unknown]


def _repeated(where: str, used: Sequence[str]) -> list[ConfigProblem]:
    repeated = sorted({axis for axis in used if used.count(axis) > 1})
    return [
        ConfigProblem(where, f"mesh axis '{axis}' twice", "each mesh axis at most once per array") for axis in repeated
    ]
