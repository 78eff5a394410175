"""A model made ready to decode: the same numbers, laid out for steps of a few tokens.

Three things are done once, before the loop, that would cost at every step:
  The decoder's layers are taken apart. A scan over stacked layers copies each layer's parameters (and its part of the
  cache) out of the stack and back at every step; apart, they are read where they lie. The price is a program that grows
  with depth, and, while both are held, memory for the decoder's parameters twice.
  Products on the same input become one: queries, keys and values, and the two of a gated MLP. Steps of a few tokens are
  bound by the number of products as much as by their size. Not where heads are split over devices: the parts would have
  to be moved between them.
  Kernels and the token table are cast to the type that the model computes in, as each product would.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_like.models.experts import Experts
from t5x_like.models.layers import Dense, Joined
from t5x_like.models.model import Model


def make_ready(model: Model, *, join: bool) -> None:
    """Changes the model, which has a decoder, in place. `join`: make one product of several."""
    model.decoder.take_apart()
    for block in model.decoder.blocks():
        if join:
            block.join()
    for _, node in nnx.iter_graph(model):
        if isinstance(node, Dense | Joined | Experts):
            _cast(node.kernel, model.dtype)
    _cast(model.token_embedder.embedding, model.dtype)
    if hasattr(model, "encoder_token_embedder"):
        _cast(model.encoder_token_embedder.embedding, model.dtype)
    if hasattr(model.head, "kernel"):
        _cast(model.head.kernel, model.dtype)


def _cast(parameter: Any, dtype: jnp.dtype) -> None:
    parameter[...] = parameter[...].astype(dtype)


def structure(graphdef: nnx.GraphDef[Model], params: Any, *, join: bool) -> tuple[nnx.GraphDef[Model], Any, Any]:
    """The graph of the ready model, its parameters as nested dict of `jax.ShapeDtypeStruct`, and the same tree with the
    logical axes of each."""

    def ready(params: Any) -> Model:
        model = nnx.merge(graphdef, params)
        make_ready(model, join=join)
        return model

    ready_graphdef, state = nnx.split(nnx.eval_shape(ready, params))

    def axes(variable: Any) -> tuple[str | None, ...]:
        named = variable.get_metadata("logical")
        # The encoder's layers are still stacked.
        return ("layers", *named) if len(variable.shape) > len(named) else named

    logical_axes = jax.tree.map(axes, state, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return ready_graphdef, nnx.to_pure_dict(state), nnx.to_pure_dict(logical_axes)


def parameters(graphdef: nnx.GraphDef[Model], params: Any, *, join: bool) -> Any:
    """The parameters of the ready model, traced or not."""
    model = nnx.merge(graphdef, params)
    make_ready(model, join=join)
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))
