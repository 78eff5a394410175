"""The step of generation compiled ahead of time: a token for each row, with the cache of what came before."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from t5x_like.config import ConfigError, Problem, RunConfig, StackConfig
from t5x_like.models import ready
from t5x_like.models.build import merge
from t5x_like.models.parameters import count_parameters
from t5x_like.partitioning.rules import spec
from t5x_like.partitioning.shardings import tree_shardings
from t5x_like.planning.compile import Compiled, Effort, compile_lowered
from t5x_like.planning.compiler import compiler_devices
from t5x_like.planning.topologies import Topology
from t5x_like.program import Program, assemble

Tree = Any

_CACHE_AXES: dict[str, tuple[str | None, ...]] = {
    "lengths": ("batch",),
    "layers": ("batch", "kv_heads", None, "head_dim"),
    "cross": ("batch", "kv_heads", None, "head_dim"),
    "encoder_segment_ids": ("batch", None),
}


def compile_decode_step(
    run: RunConfig, topology: Topology, *, rows: int | None = None, length: int | None = None, effort: Effort = "low"
) -> Compiled:
    """Compiles a step of `generate`'s loop, greedy, on parameters that are laid out for it; those of training, which it
    makes them from, are not counted.

    Args:
      rows: At once; by default as many as a training batch has.
      length: Tokens of a row that the cache has room for; by default those of a training row.

    Raises:
      UserError: XLA's TPU compiler is not installed.
      ConfigError: a model without a decoder, a run that does not fit the topology's number of devices, or a topology
        that is none of TPUs.
    """
    decoder = require_decoder(run)
    program = assemble(run, compiler_devices(topology))
    rows = rows or run.training.batch_size
    encoder_length = 0 if run.model.encoder is None else run.data.inputs_length
    length = length or (run.data.targets_length if encoder_length else run.data.row_length)
    graphdef, params = _ready(program)

    def empty(params: Tree) -> Tree:
        return merge(graphdef, params).init_cache(rows, length, encoder_length=encoder_length)

    def place(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        return _split(x, _CACHE_AXES[path[0].name], program)

    cache = jax.tree_util.tree_map_with_path(place, jax.eval_shape(empty, params))
    tokens = _split(jax.ShapeDtypeStruct((rows,), jnp.int32), ("batch",), program)

    def step(params: Tree, tokens_R: jax.Array, cache: Tree) -> tuple[jax.Array, Tree]:
        with program.activations():
            logits_Rx1xV, cache = merge(graphdef, params).decode(tokens_R[:, None], cache)
        return jnp.argmax(logits_Rx1xV[:, 0], axis=-1), cache

    lowered = jax.jit(step, donate_argnums=2).lower(params, tokens, cache)
    found = compile_lowered("decode", lowered, program, topology, effort=effort)
    counts = count_parameters(run.model)
    head = counts["token_embedder"] if run.model.tie_embeddings else counts["head"]
    seen = length + (encoder_length if decoder.cross_attention == "separate" else 0)
    attention = 4 * decoder.num_layers * decoder.num_heads * decoder.head_dim * seen
    return dataclasses.replace(
        found,
        work=f"a token for each of {rows} rows, caches of {length} tokens",
        executed_flops=float(rows * (2 * (counts["decoder"] + head) + attention)),
    )


def require_decoder(run: RunConfig) -> StackConfig:
    """Raises ConfigError if there is none."""
    if run.model.decoder is None:
        raise ConfigError([Problem("model.decoder", "None", "a decoder: nothing else is decoded")])
    return run.model.decoder


def _ready(program: Program) -> tuple[Any, Tree]:
    """The structure of the model that is laid out for decoding, and its parameters as shapes with shardings."""
    # As `decoding.ready` does: products are joined where heads and MLP are not split.
    axes = {axis for name in ("heads", "kv_heads", "mlp") for axis in program.rules.parameters[name]}
    join = math.prod(program.mesh.shape[axis] for axis in axes) == 1
    graphdef, shapes, names = ready.structure(program.spec.graphdef, program.spec.params, join=join)
    shardings = tree_shardings(program.mesh, program.rules, names, shapes)
    return graphdef, jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _split(x: Any, names: tuple[str | None, ...], program: Program) -> jax.ShapeDtypeStruct:
    split = spec(names[: x.ndim], program.rules.activations, x.shape, program.mesh)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(program.mesh, split))
