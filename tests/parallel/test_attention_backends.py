"""Blockwise, flash and splash attention on a mesh of several devices, compared with the reference on one device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from t5x_like.kernels.attention_backend import AttentionBackend, AttentionOptions
from t5x_like.kernels.attention_masks import MaskSpec, SequenceSharding
from t5x_like.kernels.blockwise_attention import BlockwiseAttention
from t5x_like.kernels.flash_attention import FlashAttention, GpuFlashAttention
from t5x_like.kernels.position_bias import RelativeBias
from t5x_like.kernels.reference_attention import ReferenceAttention
from t5x_like.kernels.splash_attention import SplashAttention

ROWS, LENGTH, HEADS, WIDTH = 4, 20, 4, 8
SEGMENTS = np.sort(np.random.default_rng(0).integers(0, 4, (ROWS, LENGTH)), axis=1)


MESH = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def gradients(
    backend: AttentionBackend,
    kv_heads: int,
    *,
    placement: SequenceSharding | None = None,
    queries: PartitionSpec | None = None,
    has_bias: bool = True,
) -> list[Array]:
    """Return all gradients and the output; `queries` is the sharding of the queries and their output."""
    random = np.random.default_rng(1)
    q, weights = (jnp.asarray(random.normal(size=(ROWS, LENGTH, HEADS, WIDTH)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(random.normal(size=(ROWS, LENGTH, kv_heads, WIDTH)), jnp.float32) for _ in range(2))
    table = jnp.asarray(random.normal(size=(8, HEADS)), jnp.float32)
    mask = MaskSpec(causal=True, q_segment_ids=SEGMENTS, kv_segment_ids=SEGMENTS)
    options = AttentionOptions(0.5, None, 0.0, None, dropout_broadcast_length=False)

    def loss(arrays: Any) -> tuple[Array, Array]:
        q, k, v, table = arrays
        if queries is not None:
            q = jax.lax.with_sharding_constraint(q, NamedSharding(MESH, queries))
        bias = RelativeBias(table, False, 20) if has_bias else None
        prepared = backend.prepare_mask(mask, bias, LENGTH, LENGTH, placement)
        out = backend.attend(q, [k], [v], prepared, options)
        return jnp.sum(out * weights), out

    return jax.tree.leaves(jax.jit(jax.grad(loss, has_aux=True))((q, k, v, table)))


def assert_equal_gradients(found: list[Array], expected: list[Array]) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * float(np.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize("flash", [FlashAttention, GpuFlashAttention])
@pytest.mark.parametrize("kv_axes", [("tensor",), ()], ids=["split key heads", "one key head for all devices"])
def test_flash_kernels_run_on_the_rows_and_heads_of_each_device(
    flash: type[FlashAttention], kv_axes: tuple[str, ...]
) -> None:
    placement = SequenceSharding(MESH, ("data",), (), ("tensor",), kv_axes)
    kv_heads = 2 if kv_axes else 1
    found = gradients(flash(block=16, interpret=True), kv_heads, placement=placement)
    assert_equal_gradients(found, gradients(ReferenceAttention(), kv_heads))


@pytest.mark.slow
@pytest.mark.parametrize("kv_axes", [("tensor",), ()], ids=["split key heads", "one key head for all devices"])
def test_splash_kernels_run_on_the_rows_and_heads_of_each_device(kv_axes: tuple[str, ...]) -> None:
    placement = SequenceSharding(MESH, ("data",), (), ("tensor",), kv_axes)
    kv_heads = 2 if kv_axes else 1
    found = gradients(SplashAttention(block=128, interpret=True), kv_heads, placement=placement, has_bias=False)
    assert_equal_gradients(found, gradients(ReferenceAttention(), kv_heads, has_bias=False))


@pytest.mark.slow
@pytest.mark.parametrize("queries", [PartitionSpec("data", None, "tensor"), PartitionSpec(None, "data")])
def test_blockwise_attention_of_sharded_queries(queries: PartitionSpec) -> None:
    """Also with queries that are split along the length, as by `context_attention="all_gather"`."""
    found = gradients(BlockwiseAttention(q_block=4, kv_block=8), 2, queries=queries)
    assert_equal_gradients(found, gradients(ReferenceAttention(), 2))
