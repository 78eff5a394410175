"""Parameter layout for decoding: the same values, arranged for steps of a few tokens.

Three changes are made once, before the decoding loop:
  The decoder's layers are unstacked. A scan over stacked layers copies the parameters of each layer (and its part of
  the cache) out of the stack and back at every step; separate layers are read in place. In exchange the program grows
  with depth, and the decoder's parameters take twice the memory while both forms are held.
  Products on the same input are fused: queries, keys and values, and the two inputs of a gated MLP. Steps of a few
  tokens are bound by the number of products as much as by their size. This is not done if heads are split over devices,
  because the parts of a fused product would have to be moved between devices.
  Kernels and the token table are cast to the type that the model computes in, which each product would do otherwise.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_like.models.layers import Dense, FusedDense
from t5x_like.models.model import Model
from t5x_like.models.moe import ExpertWeights
from t5x_like.utils.type_aliases import PyTree


def prepare_for_decoding(model: Model, *, fuse: bool) -> None:
    """Change the layout of a model in place; an encoder keeps its layers stacked. `fuse`: fuse products on the same
    input."""
    if model.config.decoder is not None:
        model.decoder.unstack()
        for block in model.decoder.blocks():
            if fuse:
                block.fuse()
    for _, node in nnx.iter_graph(model):
        # Norm scales and biases stay float32: they are small, and norms compute in float32.
        if isinstance(node, Dense | FusedDense | ExpertWeights):
            _cast(node.kernel, model.dtype)
    # Parameters are cast once. A decoding step would otherwise read all of them as float32: twice the memory traffic,
    # which bounds its speed.
    _cast(model.token_embedder.embedding, model.dtype)
    if hasattr(model, "encoder_token_embedder"):
        _cast(model.encoder_token_embedder.embedding, model.dtype)
    if hasattr(model.head, "kernel"):
        _cast(model.head.kernel, model.dtype)


def _cast(parameter: Any, dtype: jnp.dtype) -> None:
    parameter[...] = parameter[...].astype(dtype)


def abstract_layout(
    graphdef: nnx.GraphDef[Model], params: PyTree, *, fuse: bool
) -> tuple[nnx.GraphDef[Model], PyTree, PyTree]:
    """Return the structure of the model in the decoding layout.

    Args:
      graphdef: Static part of the model in the training layout.
      params: Its parameters, or `jax.ShapeDtypeStruct`s.
      fuse: Fuse products on the same input.

    Returns:
      The static part, the parameters as nested dict of `jax.ShapeDtypeStruct`, and the same tree of logical axes.
    """

    def convert(params: PyTree) -> Model:
        model = nnx.merge(graphdef, params)
        prepare_for_decoding(model, fuse=fuse)
        return model

    new_graphdef, state = nnx.split(nnx.eval_shape(convert, params))

    def axes(variable: Any) -> tuple[str | None, ...]:
        named = variable.get_metadata("logical")
        # The encoder's layers are still stacked; their axes do not name the dimension of the layers.
        return ("layers", *named) if len(variable.shape) > len(named) else named

    logical_axes = jax.tree.map(axes, state, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return new_graphdef, nnx.to_pure_dict(state), nnx.to_pure_dict(logical_axes)


def convert_params(graphdef: nnx.GraphDef[Model], params: PyTree, *, fuse: bool) -> PyTree:
    """Return the parameters in the decoding layout, concrete or traced."""
    model = nnx.merge(graphdef, params)
    prepare_for_decoding(model, fuse=fuse)
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))
