"""From a configuration to parameters, to their description, and back to a model."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx
from jax import Array

from t5x_like.config.model import ModelConfig
from t5x_like.models.electra import Electra
from t5x_like.models.experts import Experts
from t5x_like.models.heads import TaskModel
from t5x_like.models.layers import Dense
from t5x_like.models.model import Model

Params = dict[str, Any]
"""Nested dict of arrays; its path names are part of the checkpoint format."""


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model without its numbers.

    Attributes:
      graphdef: The static part; `merge` makes a model of it and parameters.
      params: Nested dict of `jax.ShapeDtypeStruct`.
      logical_axes: The same tree with a tuple of logical axis names per parameter.
    """

    graphdef: nnx.GraphDef[Model]
    params: Params
    logical_axes: Params


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A matrix, or one for each layer and expert.

    Attributes:
      shape, axes: Of the parameter: stacked dimensions, then inputs, then outputs.
      stacked: How many dimensions are layers and experts.
      split: The first dimension that is an output.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    stacked: int
    split: int


def build(config: ModelConfig, key: Array) -> Params:
    """Fresh float32 parameters. Under `jax.jit` with shardings no device holds all of them."""
    return nnx.to_pure_dict(nnx.state(_make(config, nnx.Rngs(params=key)), nnx.Param))


def _make(config: ModelConfig, rngs: nnx.Rngs) -> Model:
    if config.task_head is not None:
        return TaskModel(config, rngs)
    return Model(config, rngs) if config.generator is None else Electra(config, rngs)


def abstract(config: ModelConfig) -> ModelSpec:
    """The model's structure, shapes and logical axes; nothing is allocated."""
    model = nnx.eval_shape(lambda: _make(config, nnx.Rngs(params=0)))
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    leaves = nnx.to_flat_state(state)
    axes = {path: _logical_axes(path, variable) for path, variable in leaves}
    return ModelSpec(graphdef, params, _nest(axes))


def kernels(config: ModelConfig) -> dict[str, Kernel]:
    """The kernels of a model by their parameter's path, in its order."""
    found = {}
    for path, node in nnx.iter_graph(nnx.eval_shape(lambda: _make(config, nnx.Rngs(params=0)))):
        if isinstance(node, Dense | Experts):
            axes = _logical_axes(path, node.kernel)
            stacked = sum(name in ("layers", "experts") for name in axes)
            inputs = node.contracted if isinstance(node, Dense) else 1
            shape = tuple(node.kernel.shape)
            found["/".join(map(str, (*path, "kernel")))] = Kernel(shape, axes, stacked, stacked + inputs)
    return dict(sorted(found.items()))


def _logical_axes(path: tuple[Any, ...], variable: nnx.Variable) -> tuple[str, ...]:
    axes = variable.get_metadata("logical")
    return ("layers", *axes) if "layers" in path else axes


def _nest(flat: dict[tuple[Any, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree


def merge(graphdef: nnx.GraphDef[Model], params: Params) -> Model:
    """The model with these parameters, concrete or traced."""
    return nnx.merge(graphdef, params)
