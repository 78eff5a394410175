"""The kernels of flash attention for TPUs and GPUs, interpreted on CPUs, compared with the reference: outputs and all
gradients. Those for GPUs are lowered for CUDA as well."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from t5x_like.kernels.attention import attention
from t5x_like.kernels.attention_backend import AttentionBackend, AttentionOptions, AttentionRequest
from t5x_like.kernels.attention_masks import BlockwiseMask, KeySpec, MaskSpec
from t5x_like.kernels.flash_attention import FlashAttention, GpuFlashAttention
from t5x_like.kernels.position_bias import RelativeBias
from t5x_like.kernels.reference_attention import ReferenceAttention

ROWS, HEADS, WIDTH, LENGTH = 2, 4, 8, 40
BACKENDS = {
    "flash": FlashAttention(block=16, interpret=True),
    "flash_gpu": GpuFlashAttention(block=16, interpret=True),
}
"""Blocks so small that rows of 40 tokens have several, and a length that they do not divide."""
SEGMENTS = np.sort(np.random.default_rng(0).integers(0, 4, (ROWS, LENGTH)), axis=1)
PREFIX = np.random.default_rng(1).random((ROWS, LENGTH)) < 0.4
PADDED = np.where(np.arange(LENGTH) < np.array([[11], [0]]), 1, 0)
"""A row of 11 tokens and an empty one, all of whose keys are hidden."""


def numbers(seed: int, *shape: int, dtype: str = "float32") -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_same(
    flash: FlashAttention,
    mask: MaskSpec,
    *,
    bidirectional: bool | None = None,
    lengths: tuple[int, int] = (LENGTH, LENGTH),
    kv_heads: int = 2,
    width: int = WIDTH,
    softcap: float | None = None,
    dtype: str = "float32",
    output: float = 1e-5,
    gradients: float = 1e-4,
    dynamic_window: tuple[int, int] | None = None,
) -> None:
    """Compare with the reference; errors are relative to the largest number of each array."""
    q, weights = (numbers(seed, ROWS, lengths[0], HEADS, width, dtype=dtype) for seed in (0, 1))
    k, v = (numbers(seed, ROWS, lengths[1], kv_heads, width, dtype=dtype) for seed in (2, 3))
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
        for backend in (flash, ReferenceAttention())
    )
    limits = [*(gradients,) * 4, output]
    for a, b, limit in zip(jax.tree.leaves(found), jax.tree.leaves(expected), limits, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=0, atol=limit * max(1e-3, float(np.abs(b).max())))


PACKED_CAUSAL = (MaskSpec(causal=True, q_segment_ids=SEGMENTS, kv_segment_ids=SEGMENTS), {"bidirectional": False})
WITH_EMPTY_ROW = (MaskSpec(kv_segment_ids=PADDED), {"bidirectional": True, "softcap": 2.0})


@pytest.mark.parametrize(
    ("name", "mask", "options"),
    [
        pytest.param("flash", *PACKED_CAUSAL, id="packed causal, TPU"),
        pytest.param("flash", *WITH_EMPTY_ROW, id="padded with an empty row, TPU"),
        pytest.param("flash_gpu", *PACKED_CAUSAL, id="packed causal, GPU"),
        pytest.param("flash_gpu", *WITH_EMPTY_ROW, id="padded with an empty row, GPU", marks=pytest.mark.slow),
    ],
)
def test_kernels_equal_the_reference(name: str, mask: MaskSpec, options: dict[str, Any]) -> None:
    assert_same(BACKENDS[name], mask, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKENDS)
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
def test_further_masks_and_features(name: str, mask: MaskSpec, options: dict[str, Any]) -> None:
    assert_same(BACKENDS[name], mask, **options)


@pytest.mark.slow
def test_kernels_of_gpus_sum_the_gradient_of_the_bias_over_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program for all rows, as where heads and blocks are many; and a width that is not a power of 2."""
    monkeypatch.setattr("t5x_like.kernels.flash_gpu_kernels._PROGRAMS", 1)
    mask = MaskSpec(causal=True, q_segment_ids=SEGMENTS, kv_segment_ids=SEGMENTS)
    assert_same(BACKENDS["flash_gpu"], mask, bidirectional=False, width=20)
    windowed = MaskSpec(window=(90, 30), kv_segment_ids=np.arange(130)[None] < np.array([[130], [70]]))
    assert_same(GpuFlashAttention(block=64, interpret=True), windowed, bidirectional=True, lengths=(200, 130))


@pytest.mark.parametrize("name", BACKENDS)
def test_what_the_kernels_lack_is_refused(name: str) -> None:
    for request, reason in [
        (AttentionRequest(bias="content"), "disentangled"),
        (AttentionRequest(dropout_rate=0.1), "dropout_broadcast_length=True"),
        (AttentionRequest(is_merged=True), "several sequences"),
    ]:
        assert reason in str(BACKENDS[name].supports(request))
    q = jnp.zeros((1, 8, 2, 8))
    positions = jnp.arange(8)[None]
    with pytest.raises(ValueError, match="explicit positions"):
        attention(q, q, q, MaskSpec(q_positions=positions, kv_positions=positions), scale=1.0, backend=name)
    merged = BlockwiseMask((KeySpec(MaskSpec(), None),) * 2)
    with pytest.raises(ValueError, match="several sequences"):
        attention(q, [q, q], [q, q], merged, scale=1.0, backend=name)


@pytest.mark.parametrize("name", BACKENDS)
def test_nan_in_a_query_is_nan_in_its_output(name: str) -> None:
    q = numbers(0, 1, 16, 2, WIDTH).at[0, 3].set(jnp.nan)
    options = AttentionOptions(1.0, None, 0.0, None, dropout_broadcast_length=False)
    mask = BACKENDS[name].prepare_mask(MaskSpec(), None, 16, 16, None)
    k, v = numbers(1, 1, 16, 2, WIDTH), numbers(2, 1, 16, 2, WIDTH)
    out = np.isnan(BACKENDS[name].attend(q, [k], [v], mask, options))
    assert out[0, 3].all() and not np.delete(out, 3, axis=1).any()


@pytest.mark.parametrize("name", BACKENDS)
def test_kernels_are_refused_on_a_cpu(name: str) -> None:
    q = jnp.zeros((1, 8, 2, 8))
    with pytest.raises(ValueError, match="interpret"):
        jax.jit(lambda q: attention(q, q, q, MaskSpec(), scale=1.0, backend=name))(q)


def lowered_for_cuda(length: int, dtype: str) -> str:
    """Return the program of the gradients of one attention of packed rows with T5's bias."""
    q, k = (jax.ShapeDtypeStruct((ROWS, length, heads, 64), dtype) for heads in (HEADS, 2))
    table = jax.ShapeDtypeStruct((32, HEADS), jnp.float32)
    segments = jax.ShapeDtypeStruct((ROWS, length), jnp.int32)

    def loss(q: Array, k: Array, v: Array, table: Array, segments: Array) -> Array:
        mask = MaskSpec(causal=True, q_segment_ids=segments, kv_segment_ids=segments)
        bias = RelativeBias(table, bidirectional=False, max_distance=128)
        out = attention(q, k, v, mask, scale=1.0, softcap=30.0, relative_bias=bias, backend="flash_gpu")
        return jnp.sum(out.astype(jnp.float32))

    traced = jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(q, k, k, table, segments)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def largest_array(program: str) -> int:
    """Return the number of entries of the largest array of a lowered program."""
    return max(math.prod(map(int, shape.split("x"))) for shape in re.findall(r"tensor<(\d+(?:x\d+)*)x", program))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_programs_for_cuda_have_linear_memory_and_no_atomic_additions(dtype: str) -> None:
    short, long = (lowered_for_cuda(length, dtype) for length in (1024, 4096))
    # Forward, and gradients of the queries, of keys and values, and of the bias.
    assert long.count("@__gpu$xla.gpu.triton(") == 4
    # Of n blocks of queries and n of keys, 2 n - 1 pairs have different distances.
    assert largest_array(long) < 4.2 * largest_array(short)
    assert largest_array(long) < ROWS * HEADS * 4096**2 / 8
    # XLA adds scattered numbers in any order on GPUs.
    assert "scatter" not in long
