"""Parameters laid out for decoding (`models.ready`), made once for any number of calls."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
from flax import nnx

from t5x_like.models import ready
from t5x_like.models.model import Model
from t5x_like.partitioning.shardings import tree_shardings
from t5x_like.program import Program

Tree = Any


class ReadyParams(NamedTuple):
    """What the functions of this package take in the place of a program's parameters, to do this once and not at each
    call. They hold the decoder's parameters a second time."""

    params: Tree


def ready_params(program: Program, params: Tree | ReadyParams) -> ReadyParams:
    """The parameters, as the decoding functions want them; ready ones come back as they are."""
    return params if isinstance(params, ReadyParams) else ReadyParams(_make(program)(params))


def decoding_model(program: Program, params: Tree | ReadyParams) -> Model:
    """The model with these parameters, ready or not; call it within `program.activations()`."""
    if isinstance(params, ReadyParams):
        return nnx.merge(_structure(program)[0], params.params)
    return program.model(params)


def _joins(program: Program) -> bool:
    axes = {axis for name in ("heads", "kv_heads", "mlp") for axis in program.rules.parameters[name]}
    return math.prod(program.mesh.shape[axis] for axis in axes) == 1


@functools.cache
def _structure(program: Program) -> tuple[nnx.GraphDef[Model], Tree, Tree]:
    return ready.structure(program.spec.graphdef, program.spec.params, join=_joins(program))


@functools.cache
def _make(program: Program) -> Any:
    _, shapes, axes = _structure(program)
    return jax.jit(
        functools.partial(ready.parameters, program.spec.graphdef, join=_joins(program)),
        out_shardings=tree_shardings(program.mesh, program.rules, axes, shapes),
    )
