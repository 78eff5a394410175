"""Kernels of attention compiled for TPUs: they are accepted, and their memory beside that of the scores."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import Array
from jax.sharding import SingleDeviceSharding

from t5x_like.config.overrides import apply_overrides
from t5x_like.config.recipes import load_recipe
from t5x_like.hardware.topologies import parse_topology
from t5x_like.kernels.attention import attention
from t5x_like.kernels.attention_masks import MaskSpec
from t5x_like.kernels.position_bias import RelativeBias
from t5x_like.planning.xla.aot_compile import compile_train_step
from t5x_like.planning.xla.libtpu import compiler_devices

pytest.importorskip("libtpu")
pytestmark = [pytest.mark.aot, pytest.mark.timeout(900)]

ROWS, HEADS, WIDTH = 2, 4, 64


def peak_bytes(backend: str, length: int, *, is_encoder: bool) -> int:
    """Return the peak memory of the gradients of one attention with T5's bias, compiled for a v5e."""
    sharding = SingleDeviceSharding(compiler_devices(parse_topology("v5e:2x2"))[0])
    q = jax.ShapeDtypeStruct((ROWS, length, HEADS, WIDTH), jnp.bfloat16, sharding=sharding)
    table = jax.ShapeDtypeStruct((32, HEADS), jnp.float32, sharding=sharding)
    segments = jax.ShapeDtypeStruct((ROWS, length), jnp.int32, sharding=sharding)

    def loss(arrays: tuple[Array, ...], segments: Array) -> Array:
        q, k, v, table = arrays
        bias = None if backend == "splash" else RelativeBias(table, bidirectional=is_encoder, max_distance=128)
        mask = MaskSpec(causal=not is_encoder, q_segment_ids=segments, kv_segment_ids=segments)
        out = attention(q, k, v, mask, scale=1.0, relative_bias=bias, backend=backend)
        return jnp.sum(out.astype(jnp.float32))

    compiled = jax.jit(jax.grad(loss)).lower((q, q, q, table), segments).compile()
    return compiled.memory_analysis().peak_memory_in_bytes


@pytest.mark.parametrize("backend", ["flash", "splash"])
@pytest.mark.parametrize("is_encoder", [True, False], ids=["encoder", "decoder"])
def test_memory_of_packed_rows_is_linear_in_the_length(backend: str, is_encoder: bool) -> None:
    short, long = (peak_bytes(backend, length, is_encoder=is_encoder) for length in (1024, 4096))
    assert long < 5 * short
    assert long < peak_bytes("reference", 4096, is_encoder=is_encoder) / 10


@pytest.mark.parametrize(
    "options",
    [["tensor", "2"], ["context", "2"], ["context", "2", "--sharding.context-attention", "all_gather"]],
    ids=["tensor", "ring", "all_gather"],
)
def test_training_step_compiles_on_a_mesh(options: list[str]) -> None:
    """XLA does not partition the kernels: they run on each device's rows, heads and parts of sequences."""
    # "auto" takes flash for the self-attentions and splash for the cross-attention from a length of 128, and flash for
    # all of them if devices split the sequence.
    lengths = ["256", "128"] if options[0] == "tensor" else ["512", "512"]
    overrides = ["--data.inputs-length", lengths[0], "--data.targets-length", lengths[1], f"--sharding.{options[0]}"]
    overrides += options[1:]
    compiled = compile_train_step(apply_overrides(load_recipe("smoke"), overrides), parse_topology("v5e:2x2"))
    assert compiled.fits, compiled.error
    assert not compiled.warnings
