"""From a configuration to parameters, to their description, and back to a model."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx
from jax import Array

from t5x_like.config.model import ModelConfig
from t5x_like.models.electra import Electra
from t5x_like.models.heads import TaskModel
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
