"""Which mesh axes a logical axis is split over: two tables, one for parameters and one for activations.

Model code names axes ("embed", "heads", ...) and nothing else. FSDP is the line `"embed": "fsdp"` of the parameter
table: parameters are stored split over the same devices that split the batch, and gathered where they are used, because
the activation table leaves "embed" whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from jax.sharding import Mesh, PartitionSpec

from t5x_like.config import ConfigError, PartitioningConfig, Problem

MeshAxes = tuple[str, ...]
"""The mesh axes that split a dimension, outermost first; () leaves it whole."""
Table = Mapping[str, MeshAxes]
LogicalAxes = tuple[str | None, ...]
"""The logical name of each dimension of an array; None: always whole."""

PARAMETERS: Table = {
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "layers": (),
    "norm": (),
    "positions": (),
    "relative_buckets": (),
}
ACTIVATIONS: Table = {
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "embed": (),
    "vocab": ("tensor",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
}
MAY_STAY_WHOLE = frozenset({"kv_heads"})
"""Parameter axes that stay whole, without a complaint, where the mesh does not divide them: grouped and multi-query
attention has fewer key heads than a large tensor degree, and each device then keeps all of them."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """The two tables. The same name may be split in one and whole in the other."""

    parameters: Table
    activations: Table


def standard(config: PartitioningConfig) -> Rules:
    """The standard tables, with the pairs of the configuration in front."""

    def merged(table: Table, pairs: Sequence[tuple[str, str | None]]) -> Table:
        return {**table, **{name: () if axis is None else (axis,) for name, axis in pairs}}

    return Rules(
        parameters=merged(PARAMETERS, config.parameter_rules),
        activations=merged(ACTIVATIONS, config.activation_rules),
    )


def split_axes(name: str | None, table: Table, size: int, mesh: Mesh) -> MeshAxes:
    """The mesh axes of more than one device that split a dimension of `size`; () if they do not divide it."""
    axes = tuple(axis for axis in table.get(name, ()) if mesh.shape[axis] > 1) if name is not None else ()
    return axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()


def spec(names: LogicalAxes, table: Table, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """How an array of `shape` is split over `mesh`.

    Mesh axes of one device are left out. A dimension that its mesh axes do not divide stays whole; for parameters,
    `problems` reports it.

    Raises:
      ConfigError: a name without a rule, a rule that names no mesh axis, or a mesh axis twice in one array.
    """
    if len(names) != len(shape):
        raise ValueError(f"{len(names)} logical axes {names} for an array of shape {tuple(shape)}")
    found = _rule_problems(str(names), names, table, mesh)
    if found:
        raise ConfigError(found)
    dimensions = [split_axes(name, table, size, mesh) for name, size in zip(names, shape, strict=True)]
    used = [axis for axes in dimensions for axis in axes]
    if len(set(used)) != len(used):
        raise ConfigError([_twice(str(names), names, used)])
    return PartitionSpec(*(None if not axes else axes[0] if len(axes) == 1 else axes for axes in dimensions))


def problems(path: str, names: LogicalAxes, table: Table, shape: Sequence[int], mesh: Mesh) -> list[Problem]:
    """All that is wrong with the partitioning of the parameter (or optimizer state) at `path`."""
    found = _rule_problems(path, names, table, mesh)
    if found:
        return found
    used = []
    for name, size in zip(names, shape, strict=True):
        wanted = [axis for axis in table.get(name, ()) if mesh.shape[axis] > 1] if name is not None else []
        ways = math.prod(mesh.shape[axis] for axis in wanted)
        if size % ways == 0:
            used += wanted
        elif name not in MAY_STAY_WHOLE:
            found.append(
                Problem(
                    f"{path}: {name}",
                    f"{size}",
                    f"a multiple of {ways} ({' x '.join(f'{axis}={mesh.shape[axis]}' for axis in wanted)})",
                    f"choose other degrees, or leave this axis whole with partitioning.parameter_rules ('{name}', None)",
                )
            )
    return found if len(set(used)) == len(used) else [*found, _twice(path, names, used)]


def _rule_problems(where: str, names: LogicalAxes, table: Table, mesh: Mesh) -> list[Problem]:
    found = []
    for name in names:
        if name is None:
            continue
        if name not in table:
            known = ", ".join(sorted(table))
            found.append(Problem(where, f"the logical axis '{name}'", f"an axis that has a rule ({known})"))
        for axis in table.get(name, ()):
            if axis not in mesh.shape:
                expected = f"one of {', '.join(mesh.shape)}"
                found.append(Problem(where, f"a rule that splits '{name}' over '{axis}'", expected))
    return found


def _twice(where: str, names: LogicalAxes, used: Sequence[str]) -> Problem:
    twice = sorted({axis for axis in used if used.count(axis) > 1})
    return Problem(
        where, f"mesh axis {', '.join(twice)} twice for axes {names}", "each mesh axis at most once per array"
    )
