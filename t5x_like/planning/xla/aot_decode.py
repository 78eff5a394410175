"""Ahead-of-time compilation of a decoding step: one token per row, with a KV cache."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from t5x_like.config import RunConfig, StackConfig
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.hardware.topologies import Topology
from t5x_like.models import inference_layout
from t5x_like.models.factory import bind_params
from t5x_like.planning.estimate.flops import decode_flops
from t5x_like.planning.xla.aot_compile import CompiledStep, Effort, compile_lowered
from t5x_like.planning.xla.libtpu import compiler_devices
from t5x_like.program import Program, build_program
from t5x_like.sharding.rules import spec
from t5x_like.sharding.shardings import tree_shardings
from t5x_like.utils.type_aliases import PyTree

_CACHE_AXES: dict[str, tuple[str | None, ...]] = {
    "lengths": ("batch",),
    "layers": ("batch", "kv_heads", None, "head_dim"),
    "cross": ("batch", "kv_heads", None, "head_dim"),
    "encoder_segment_ids": ("batch", None),
}


def compile_decode_step(
    run: RunConfig, topology: Topology, *, rows: int | None = None, length: int | None = None, effort: Effort = "low"
) -> CompiledStep:
    """Compile a greedy step of the decoding loop of `generate`, on parameters in the inference layout.

    The training parameters that the inference layout is made from are not counted.

    Args:
      rows: Number of rows that are decoded together; by default the rows of a training batch.
      length: Tokens of a row in the cache; by default those of a training row.

    Raises:
      UserError: XLA's TPU compiler is not installed.
      ConfigError: The model has no decoder, the run does not fit the topology's number of devices, or the topology has
        no TPUs.
    """
    require_decoder(run)
    program = build_program(run, compiler_devices(topology))
    rows = rows or run.training.global_batch_size
    encoder_length = 0 if run.model.encoder is None else run.data.inputs_length
    length = length or (run.data.targets_length if encoder_length else run.data.row_length)
    graphdef, params = _inference_params(program)

    def empty(params: PyTree) -> PyTree:
        return bind_params(graphdef, params).init_cache(rows, length, encoder_length=encoder_length)

    def with_sharding(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        return _sharded(x, _CACHE_AXES[path[0].name], program)

    cache = jax.tree_util.tree_map_with_path(with_sharding, jax.eval_shape(empty, params))
    tokens = _sharded(jax.ShapeDtypeStruct((rows,), jnp.int32), ("batch",), program)

    def step(params: PyTree, tokens_R: jax.Array, cache: PyTree) -> tuple[jax.Array, PyTree]:
        with program.mesh_context():
            logits_Rx1xV, cache = bind_params(graphdef, params).decode(tokens_R[:, None], cache)
        return jnp.argmax(logits_Rx1xV[:, 0], axis=-1), cache

    lowered = jax.jit(step, donate_argnums=2).lower(params, tokens, cache)
    compiled = compile_lowered("decode", lowered, program, topology, effort=effort)
    return dataclasses.replace(
        compiled,
        work=f"one token for each of {rows} rows, caches of {length} tokens",
        executed_flops=decode_flops(run.model, rows=rows, length=length, encoder_length=encoder_length),
    )


def require_decoder(run: RunConfig) -> StackConfig:
    """Return the decoder of a run's model.

    Raises:
      ConfigError: The model has no decoder.
    """
    if run.model.decoder is None:
        raise ConfigError([ConfigProblem("model.decoder", "None", "a decoder: only a decoder has a decoding step")])
    return run.model.decoder


def _inference_params(program: Program) -> tuple[Any, PyTree]:
    """Return the model's structure in the inference layout, and its parameters as shapes with shardings."""
    # As in `decoding.inference_params`: products are fused if heads and MLP are not split.
    axes = {axis for name in ("heads", "kv_heads", "mlp") for axis in program.rules.parameters[name]}
    fuse = math.prod(program.mesh.shape[axis] for axis in axes) == 1
    graphdef, shapes, names = inference_layout.abstract_layout(program.spec.graphdef, program.spec.params, fuse=fuse)
    shardings = tree_shardings(program.mesh, program.rules, names, shapes)
    return graphdef, jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _sharded(x: Any, names: tuple[str | None, ...], program: Program) -> jax.ShapeDtypeStruct:
    split = spec(names[: x.ndim], program.rules.activations, x.shape, program.mesh)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(program.mesh, split))
