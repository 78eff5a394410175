"""The kernels of flash attention, interpreted on CPUs, compared with the reference: outputs and all gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from t5x_like.kernels.attention import attention
from t5x_like.kernels.attention_backend import AttentionBackend, AttentionOptions, AttentionRequest
from t5x_like.kernels.attention_masks import BlockwiseMask, KeySpec, MaskSpec
from t5x_like.kernels.flash_attention import FlashAttention
from t5x_like.kernels.position_bias import RelativeBias
from t5x_like.kernels.reference_attention import ReferenceAttention

ROWS, HEADS, WIDTH, LENGTH = 2, 4, 8, 40
FLASH = FlashAttention(block=16, interpret=True)
"""Blocks so small that rows of 40 tokens have several, and a length that they do not divide."""
SEGMENTS = np.sort(np.random.default_rng(0).integers(0, 4, (ROWS, LENGTH)), axis=1)
PREFIX = np.random.default_rng(1).random((ROWS, LENGTH)) < 0.4
PADDED = np.where(np.arange(LENGTH) < np.array([[11], [0]]), 1, 0)
"""A row of 11 tokens and an empty one, all of whose keys are hidden."""


def numbers(seed: int, *shape: int, dtype: str = "float32") -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_same(
    mask: MaskSpec,
    *,
    bidirectional: bool | None = None,
    lengths: tuple[int, int] = (LENGTH, LENGTH),
    kv_heads: int = 2,
    softcap: float | None = None,
    dtype: str = "float32",
    output: float = 1e-5,
    gradients: float = 1e-4,
    dynamic_window: tuple[int, int] | None = None,
) -> None:
    """Compare with the reference; errors are relative to the largest number of each array."""
    q, weights = (numbers(seed, ROWS, lengths[0], HEADS, WIDTH, dtype=dtype) for seed in (0, 1))
    k, v = (numbers(seed, ROWS, lengths[1], kv_heads, WIDTH, dtype=dtype) for seed in (2, 3))
    table = numbers(4, 8, HEADS)
    options = AttentionOptions(0.5, softcap, 0.0, None, dropout_broadcast_length=False)

    def loss(arrays: Any, backend: AttentionBackend) -> tuple[Array, Array]:
        q, k, v, table = arrays
        bias = None if bidirectional is None else RelativeBias(table, bidirectional, 20)
        prepared = backend.prepare_mask(mask, bias, *lengths, None)
        if dynamic_window is not None and isinstance(prepared, BlockwiseMask):
            window = jnp.asarray(dynamic_window, jnp.int32)
            prepared = BlockwiseMask((KeySpec(MaskSpec(causal=mask.causal), bias, window),))
        out = backend.attend(q, [k], [v], prepared, options)
        return jnp.sum((out * weights).astype(jnp.float32)), out

    found, expected = (
        jax.jit(jax.grad(lambda arrays, backend=backend: loss(arrays, backend), has_aux=True))((q, k, v, table))
        for backend in (FLASH, ReferenceAttention())
    )
    limits = [*(gradients,) * 4, output]
    for a, b, limit in zip(jax.tree.leaves(found), jax.tree.leaves(expected), limits, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=0, atol=limit * max(1e-3, float(np.abs(b).max())))


@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (MaskSpec(causal=True, q_segment_ids=SEGMENTS, kv_segment_ids=SEGMENTS), {"bidirectional": False}),
        (MaskSpec(kv_segment_ids=PADDED), {"bidirectional": True, "softcap": 2.0}),
    ],
    ids=["packed causal", "padded with an empty row"],
)
def test_kernels_equal_the_reference(mask: MaskSpec, options: dict[str, Any]) -> None:
    assert_same(mask, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (MaskSpec(), {"lengths": (LENGTH, 21), "kv_heads": 4}),
        (
            MaskSpec(causal=True, q_segment_ids=SEGMENTS, kv_segment_ids=SEGMENTS, q_prefix=PREFIX, kv_prefix=PREFIX),
            {"bidirectional": True, "kv_heads": 1},
        ),
        # The last queries are so far behind the keys that no block is in their window.
        (MaskSpec(window=(3, 2)), {"lengths": (LENGTH, 16), "bidirectional": True}),
        (MaskSpec(causal=True, window=(5, 0)), {"dynamic_window": (5, 0)}),
        (MaskSpec(causal=True), {"bidirectional": False, "dtype": "bfloat16", "output": 0.02, "gradients": 0.03}),
    ],
    ids=["cross", "packed prefix", "window", "dynamic window", "bfloat16"],
)
def test_further_masks_and_features(mask: MaskSpec, options: dict[str, Any]) -> None:
    assert_same(mask, **options)


def test_what_the_kernels_lack_is_refused() -> None:
    for request, reason in [
        (AttentionRequest(bias="content"), "disentangled"),
        (AttentionRequest(dropout_rate=0.1), "dropout_broadcast_length=True"),
        (AttentionRequest(is_merged=True), "several sequences"),
    ]:
        assert reason in str(FLASH.supports(request))
    q = jnp.zeros((1, 8, 2, 8))
    positions = jnp.arange(8)[None]
    with pytest.raises(ValueError, match="explicit positions"):
        attention(q, q, q, MaskSpec(q_positions=positions, kv_positions=positions), scale=1.0, backend="flash")
    merged = BlockwiseMask((KeySpec(MaskSpec(), None),) * 2)
    with pytest.raises(ValueError, match="several sequences"):
        attention(q, [q, q], [q, q], merged, scale=1.0, backend="flash")


def test_nan_in_a_query_is_nan_in_its_output() -> None:
    q = numbers(0, 1, 16, 2, WIDTH).at[0, 3].set(jnp.nan)
    options = AttentionOptions(1.0, None, 0.0, None, dropout_broadcast_length=False)
    mask = FLASH.prepare_mask(MaskSpec(), None, 16, 16, None)
    k, v = numbers(1, 1, 16, 2, WIDTH), numbers(2, 1, 16, 2, WIDTH)
    out = np.isnan(FLASH.attend(q, [k], [v], mask, options))
    assert out[0, 3].all() and not np.delete(out, 3, axis=1).any()


def test_kernels_are_refused_on_a_cpu() -> None:
    q = jnp.zeros((1, 8, 2, 8))
    with pytest.raises(ValueError, match="interpret"):
        jax.jit(lambda q: attention(q, q, q, MaskSpec(), scale=1.0, backend="flash"))(q)
