"""Parameters in the layout of inference (`models.inference_layout`), converted once for any number of calls."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
from flax import nnx

from t5x_like.adapters.lora import summed
from t5x_like.models import inference_layout
from t5x_like.models.model import Model
from t5x_like.program import Program
from t5x_like.sharding.shardings import tree_shardings
from t5x_like.utils.type_aliases import PyTree


class InferenceParams(NamedTuple):
    """Parameters in the layout of inference. The decoding functions take them in place of a program's parameters, so
    that the conversion is done once and not at each call. They hold the decoder's parameters a second time."""

    params: PyTree


def inference_params(program: Program, params: PyTree | InferenceParams) -> InferenceParams:
    """Return the parameters in the layout of inference; converted ones are returned unchanged."""
    return params if isinstance(params, InferenceParams) else InferenceParams(_make(program)(params))


def decoding_model(program: Program, params: PyTree | InferenceParams) -> Model:
    """Return the model with these parameters, in either layout; call it within `program.mesh_context()`."""
    if isinstance(params, InferenceParams):
        return nnx.merge(_structure(program)[0], params.params)
    return program.model(params)


def _fuses(program: Program) -> bool:
    # Split heads are contiguous parts of each projection, but not of their concatenation.
    axes = {axis for name in ("heads", "kv_heads", "mlp") for axis in program.rules.parameters[name]}
    return math.prod(program.mesh.shape[axis] for axis in axes) == 1


@functools.cache
def _structure(program: Program) -> tuple[nnx.GraphDef[Model], PyTree, PyTree]:
    return inference_layout.abstract_layout(program.spec.graphdef, program.spec.params, fuse=_fuses(program))


@functools.cache
def _make(program: Program) -> Any:
    _, shapes, axes = _structure(program)

    def convert(params: PyTree) -> PyTree:
        # While adapters train, they are apart from their base.
        return inference_layout.convert_params(program.spec.graphdef, summed(params), fuse=_fuses(program))

    return jax.jit(
        convert,
        out_shardings=tree_shardings(program.mesh, program.rules, axes, shapes),
    )
