"""Flash attention on a mesh of several devices, its kernels interpreted, compared with the reference on one device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import AxisType, Mesh

from t5x_like.kernels.attention_backend import AttentionBackend, AttentionOptions
from t5x_like.kernels.attention_masks import MaskSpec, SequenceSharding
from t5x_like.kernels.flash_attention import FlashAttention
from t5x_like.kernels.position_bias import RelativeBias
from t5x_like.kernels.reference_attention import ReferenceAttention

ROWS, LENGTH, HEADS, WIDTH = 4, 20, 4, 8
RANDOM = np.random.default_rng(0)
SEGMENTS = np.sort(RANDOM.integers(0, 4, (ROWS, LENGTH)), axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("kv_axes", [("tensor",), ()], ids=["split key heads", "one key head for all devices"])
def test_rows_and_heads_are_split_over_devices(kv_axes: tuple[str, ...]) -> None:
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    placement = SequenceSharding(mesh, ("data",), (), ("tensor",), kv_axes)
    kv_heads = 2 if kv_axes else 1
    q, weights = (jnp.asarray(RANDOM.normal(size=(ROWS, LENGTH, HEADS, WIDTH)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(RANDOM.normal(size=(ROWS, LENGTH, kv_heads, WIDTH)), jnp.float32) for _ in range(2))
    table = jnp.asarray(RANDOM.normal(size=(8, HEADS)), jnp.float32)
    mask = MaskSpec(causal=True, q_segment_ids=SEGMENTS, kv_segment_ids=SEGMENTS)
    options = AttentionOptions(0.5, None, 0.0, None, dropout_broadcast_length=False)

    def loss(arrays: Any, backend: AttentionBackend, placement: SequenceSharding | None) -> tuple[Array, Array]:
        q, k, v, table = arrays
        prepared = backend.prepare_mask(mask, RelativeBias(table, False, 20), LENGTH, LENGTH, placement)
        out = backend.attend(q, [k], [v], prepared, options)
        return jnp.sum(out * weights), out

    backends: list[tuple[AttentionBackend, SequenceSharding | None]] = [
        (FlashAttention(block=16, interpret=True), placement),
        (ReferenceAttention(), None),
    ]
    found, expected = (
        jax.jit(jax.grad(lambda arrays, each=each: loss(arrays, *each), has_aux=True))((q, k, v, table))
        for each in backends
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * float(np.abs(b).max()))
