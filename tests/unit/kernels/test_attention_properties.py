"""Random masks: every backend that masks block by block equals the reference, in outputs and in all gradients.

Segments, prefixes and windows are arguments of one program per backend, with lengths that its blocks do not divide,
queries without any visible key, fewer key heads than query heads and a soft cap.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import Array

from t5x_like.kernels.attention_backend import AttentionBackend, AttentionOptions
from t5x_like.kernels.attention_masks import BlockwiseMask, DenseMask, KeySpec, MaskSpec, dense_mask, materialize
from t5x_like.kernels.blockwise_attention import BlockwiseAttention
from t5x_like.kernels.flash_attention import FlashAttention, GpuFlashAttention
from t5x_like.kernels.position_bias import RelativeBias
from t5x_like.kernels.reference_attention import ReferenceAttention
from t5x_like.kernels.splash_attention import SplashAttention

ROWS, HEADS, KV_HEADS, WIDTH = 2, 4, 2, 8


@dataclasses.dataclass(frozen=True)
class Case:
    """A backend with the lengths of its test and what it supports."""

    backend: AttentionBackend
    lengths: tuple[int, int]
    has_bias: bool
    has_window: bool


CASES = {
    "blockwise": Case(BlockwiseAttention(q_block=4, kv_block=8), (19, 13), has_bias=True, has_window=True),
    "flash": Case(FlashAttention(block=8, interpret=True), (19, 13), has_bias=True, has_window=True),
    "flash_gpu": Case(GpuFlashAttention(block=16, interpret=True), (19, 13), has_bias=True, has_window=True),
    "splash": Case(SplashAttention(block=128, interpret=True), (150, 130), has_bias=False, has_window=False),
}


@functools.cache
def gradients(name: str, is_reference: bool) -> Any:
    """Return the compiled gradients and output of a case by its backend, or by the reference."""
    case = CASES[name]
    q_length, kv_length = case.lengths
    random = np.random.default_rng(0)
    q, weights = (jnp.asarray(random.normal(size=(ROWS, q_length, HEADS, WIDTH)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(random.normal(size=(ROWS, kv_length, KV_HEADS, WIDTH)), jnp.float32) for _ in range(2))
    table = jnp.asarray(random.normal(size=(8, HEADS)), jnp.float32)
    options = AttentionOptions(0.5, 2.0, 0.0, None, dropout_broadcast_length=False)

    def loss(arrays: Any, mask: MaskSpec, window: Array) -> tuple[Array, Array]:
        q, k, v, table = arrays
        bias = RelativeBias(table, bidirectional=True, max_distance=12) if case.has_bias else None
        limited = dataclasses.replace(mask, window=(window[0], window[1])) if case.has_window else mask  # type: ignore[arg-type]
        visible = dense_mask(limited, q_length, kv_length)
        assert visible is not None
        if is_reference:
            dense = materialize(MaskSpec(), bias, q_length, kv_length)
            out = ReferenceAttention().attend(q, [k], [v], DenseMask(dense.bias, visible), options)
        else:
            keys = KeySpec(mask, bias, window if case.has_window else None)
            out = case.backend.attend(q, [k], [v], BlockwiseMask((keys,)), options)
        # The output of a query without any visible key is to be ignored, and must be finite.
        is_seen = jnp.any(visible, axis=3)[:, 0, :, None, None]
        return jnp.sum(jnp.where(is_seen, out * weights, 0.0)) + 0.0 * jnp.sum(out), jnp.where(is_seen, out, 0.0)

    return functools.partial(jax.jit(jax.grad(loss, has_aux=True)), (q, k, v, table))


def segments(length: int) -> st.SearchStrategy[np.ndarray]:
    """Return ids 0, 1, 2 in this order in each row, with any borders: padding comes first, to be unlike all others."""
    row = st.tuples(st.integers(0, length), st.integers(0, length)).map(
        lambda borders: sum((np.arange(length) >= border).astype(np.int32) for border in borders)
    )
    return st.lists(row, min_size=ROWS, max_size=ROWS).map(np.stack)


def bits(length: int) -> st.SearchStrategy[np.ndarray]:
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    return st.lists(row, min_size=ROWS, max_size=ROWS).map(lambda rows: np.asarray(rows, bool))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_random_masks_equal_the_reference(name: str, data: st.DataObject) -> None:
    case = CASES[name]
    q_length, kv_length = case.lengths
    mask = MaskSpec(
        causal=True,
        q_segment_ids=data.draw(segments(q_length)),
        kv_segment_ids=data.draw(segments(kv_length)),
    )
    if case.has_window:
        mask = dataclasses.replace(mask, q_prefix=data.draw(bits(q_length)), kv_prefix=data.draw(bits(kv_length)))
    limits = data.draw(st.tuples(st.integers(0, q_length), st.integers(0, kv_length)))
    arguments = jax.tree.map(jnp.asarray, mask), jnp.asarray(limits, jnp.int32)
    found, expected = (jax.tree.leaves(gradients(name, is_reference)(*arguments)) for is_reference in (False, True))
    for a, b, limit in zip(found, expected, [1e-4] * 4 + [1e-5], strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=0, atol=limit * max(1.0, float(np.abs(b).max())))
