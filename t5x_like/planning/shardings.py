"""How each parameter and activation of a training step is split, and its bytes on a device: nothing is compiled."""

from __future__ import annotations

import collections
import math
from typing import Any, NamedTuple

import jax

from t5x_like.partitioning.constrain import Constrained, recorded
from t5x_like.planning.compile import abstract_batch, carried_state
from t5x_like.planning.memory import leaf_bytes
from t5x_like.program import Program


class Row(NamedTuple):
    """One array, or several that are alike.

    Attributes:
      name: Path of a parameter; of an activation where in the model it is made.
      axes: Logical axes of an activation, "" for parameters.
      spec: Mesh axes of each dimension.
      copies: How many are alike.
      bytes_per_device: Of one of them.
    """

    name: str
    axes: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    copies: int
    bytes_per_device: int


def parameter_rows(program: Program) -> list[Row]:
    """The parameters in their order; of a run with adapters those of the base follow."""
    rows = []
    for prefix, tree in (("", program.abstract_params), ("base/", program.abstract_base or {})):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = prefix + jax.tree_util.keystr(path, simple=True, separator="/")
            spec = spec_text(leaf.sharding.spec, len(leaf.shape))
            rows.append(Row(name, "", tuple(leaf.shape), str(leaf.dtype), spec, 1, leaf_bytes(leaf)))
    return rows


def activation_rows(program: Program) -> list[Row]:
    """What the model constrains as the training step is traced, in order; the layers of a scan count once.

    On one device there is nothing to split, and nothing is constrained.
    """
    with recorded() as found:
        # Traced anew: what was traced before is cached, and says nothing.
        step: Any = program.train_step
        jax.eval_shape(step.__wrapped__, carried_state(program), abstract_batch(program))
    counted = collections.Counter(map(_row, found))
    return [row._replace(copies=copies) for row, copies in counted.items()]


def _row(found: Constrained) -> Row:
    return Row(
        name=found.place.replace("<locals>.", ""),
        axes=", ".join(axis or "-" for axis in found.names),
        shape=found.shape,
        dtype=str(found.dtype),
        spec=spec_text(found.sharding.spec, len(found.shape)),
        copies=1,
        bytes_per_device=math.prod(found.sharding.shard_shape(found.shape)) * found.dtype.itemsize,
    )


def spec_text(spec: Any, rank: int) -> str:
    """(fsdp, -, tensor), with a dash for a dimension that is whole."""
    dimensions = [*spec, *[None] * (rank - len(spec))]
    return (
        "("
        + ", ".join("+".join((axes,) if isinstance(axes, str) else axes) if axes else "-" for axes in dimensions)
        + ")"
    )
