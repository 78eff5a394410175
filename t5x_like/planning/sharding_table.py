"""Table of the shardings of a training step: how each parameter and activation is split, and its bytes on a device.

Nothing is compiled for it.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any, NamedTuple

import jax

from t5x_like.planning.estimate.memory import leaf_bytes
from t5x_like.planning.xla.aot_compile import abstract_batch, carried_state
from t5x_like.program import Program, build_program
from t5x_like.sharding.constrain import Constrained, record_constraints
from t5x_like.utils import tree_paths


class ShardedArray(NamedTuple):
    """One array, or several that are alike.

    Attributes:
      name: Path of a parameter; for an activation the method of the model that creates it.
      axes: Logical axes of an activation; "" for parameters.
      spec: Mesh axes of each dimension.
      copies: Number of arrays that are alike.
      bytes_per_device: Bytes of one of them on a device.
    """

    name: str
    axes: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    copies: int
    bytes_per_device: int


def parameter_shardings(program: Program) -> list[ShardedArray]:
    """Return the parameters in their order; in a LoRA run the base follows, as the training state holds it."""
    trees = {"": program.abstract_params, "base/": program.abstract_base or {}}
    return [array for prefix, tree in trees.items() for array in tree_table(tree, prefix)]


def tree_table(tree: Any, prefix: str = "") -> list[ShardedArray]:
    """Return the arrays of a tree of `jax.ShapeDtypeStruct`s with shardings, in the order of the tree."""
    arrays = []
    for path, leaf in tree_paths.by_path(tree).items():
        spec = spec_text(leaf.sharding.spec, len(leaf.shape))
        arrays.append(ShardedArray(prefix + path, "", tuple(leaf.shape), str(leaf.dtype), spec, 1, leaf_bytes(leaf)))
    return arrays


def activation_shardings(program: Program) -> list[ShardedArray]:
    """Return the activations that the model constrains in a training step, in order; layers of a scan count once.

    On one device there is nothing to split, and nothing is constrained.
    """
    program = _without_cudnn(program)
    with record_constraints() as calls:
        # The unjitted step is traced again: a cached trace would make no calls.
        step: Any = program.train_step
        jax.eval_shape(step.__wrapped__, carried_state(program), abstract_batch(program))
    counted = collections.Counter(map(_activation, calls))
    return [array._replace(copies=copies) for array, copies in counted.items()]


def _without_cudnn(program: Program) -> Program:
    """Return the program with "blockwise" in place of cuDNN, whose version JAX asks for when an attention is traced.

    GPUs are planned on machines without it, and the two constrain the same activations.
    """
    model = program.run.model
    if model.attention != "cudnn":
        return program
    replaced = dataclasses.replace(program.run, model=dataclasses.replace(model, attention="blockwise"))
    return build_program(replaced, list(program.mesh.devices.flat))


def _activation(call: Constrained) -> ShardedArray:
    return ShardedArray(
        name=call.caller.replace("<locals>.", ""),
        axes=", ".join(axis or "-" for axis in call.names),
        shape=call.shape,
        dtype=str(call.dtype),
        spec=spec_text(call.sharding.spec, len(call.shape)),
        copies=1,
        bytes_per_device=math.prod(call.sharding.shard_shape(call.shape)) * call.dtype.itemsize,
    )


def spec_text(spec: Any, rank: int) -> str:
    """Return a partition specification as `(fsdp, -, tensor)`, with a dash for a dimension that is whole."""
    dimensions = [*spec, *[None] * (rank - len(spec))]
    return (
        "("
        + ", ".join("+".join((axes,) if isinstance(axes, str) else axes) if axes else "-" for axes in dimensions)
        + ")"
    )
