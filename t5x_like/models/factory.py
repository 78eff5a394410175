"""Construction of models: initial parameters, abstract shapes with logical axes, and models bound to parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx, traverse_util
from jax import Array

from t5x_like.config.model import ModelConfig
from t5x_like.models.electra import Electra
from t5x_like.models.layers import Dense
from t5x_like.models.model import Model
from t5x_like.models.moe import ExpertWeights
from t5x_like.models.task_heads import TaskModel

Params = dict[str, Any]
"""Nested dict of arrays; its path names are part of the checkpoint format."""


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Model without parameter values.

    Attributes:
      graphdef: Static part; `bind_params` combines it with parameters.
      params: Nested dict of `jax.ShapeDtypeStruct`.
      logical_axes: The same tree with a tuple of logical axis names per parameter.
    """

    graphdef: nnx.GraphDef[Model]
    params: Params
    logical_axes: Params


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Matrix parameter, or one matrix per layer and expert.

    Attributes:
      shape: Shape of the parameter: stacked dimensions, then inputs, then outputs.
      axes: Logical axes of the parameter.
      stacked: Number of dimensions that count layers and experts.
      split: Index of the first output dimension.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    stacked: int
    split: int


def init_params(config: ModelConfig, key: Array) -> Params:
    """Return fresh float32 parameters. Under `jax.jit` with output shardings no device holds all of them."""
    return nnx.to_pure_dict(nnx.state(_build(config, nnx.Rngs(params=key)), nnx.Param))


def _build(config: ModelConfig, rngs: nnx.Rngs) -> Model:
    if config.task_head is not None:
        return TaskModel(config, rngs)
    return Model(config, rngs) if config.generator is None else Electra(config, rngs)


def abstract_model(config: ModelConfig) -> ModelSpec:
    """Return the model's structure, shapes and logical axes without allocating arrays.

    Raises:
      ConfigError: the configuration is not valid; all problems are listed.
    """
    # The constructor is traced with shapes only: a model of any size is described without memory or devices.
    model = nnx.eval_shape(lambda: _build(config, nnx.Rngs(params=0)))
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    leaves = nnx.to_flat_state(state)
    axes = {path: _logical_axes(path, variable) for path, variable in leaves}
    return ModelSpec(graphdef, params, traverse_util.unflatten_dict(axes))


def kernels(config: ModelConfig) -> dict[str, Kernel]:
    """Return the kernels of a model by the path of their parameter, sorted."""
    matrices = {}
    for path, node in nnx.iter_graph(nnx.eval_shape(lambda: _build(config, nnx.Rngs(params=0)))):
        if isinstance(node, Dense | ExpertWeights):
            axes = _logical_axes(path, node.kernel)
            stacked = sum(name in ("layers", "experts") for name in axes)
            # Attention kernels have three dimensions: users that treat a kernel as a matrix must know where its inputs
            # end.
            inputs = node.contracted if isinstance(node, Dense) else 1
            shape = tuple(node.kernel.shape)
            matrices["/".join(map(str, (*path, "kernel")))] = Kernel(shape, axes, stacked, stacked + inputs)
    return dict(sorted(matrices.items()))


def _logical_axes(path: tuple[Any, ...], variable: nnx.Variable) -> tuple[str, ...]:
    axes = variable.get_metadata("logical")
    return ("layers", *axes) if "layers" in path else axes


def bind_params(graphdef: nnx.GraphDef[Model], params: Params) -> Model:
    """Return the model with these parameters, concrete or traced."""
    return nnx.merge(graphdef, params)
