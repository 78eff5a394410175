"""Flash kernels and blocks of einsums over a split sequence on eight devices, compared with the reference on one."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import AxisType, Mesh

from t5x_like.kernels.attention_backend import AttentionBackend, AttentionOptions
from t5x_like.kernels.attention_masks import BlockwiseMask, KeySpec, MaskSpec, SequenceSharding, SplitForm
from t5x_like.kernels.blockwise_attention import BlockwiseAttention
from t5x_like.kernels.flash_attention import FlashAttention, GpuFlashAttention
from t5x_like.kernels.position_bias import RelativeBias
from t5x_like.kernels.reference_attention import ReferenceAttention

ROWS, LENGTH, HEADS, WIDTH = 2, 48, 4, 8
FLASH = FlashAttention(block=8, interpret=True)
"""Four devices have 12 queries each: two chunks of 6 under a causal mask, whose blocks of 8 are padded."""
RANDOM = np.random.default_rng(0)
SEGMENTS = np.sort(RANDOM.integers(0, 4, (ROWS, LENGTH)), axis=1)
PREFIX = RANDOM.random((ROWS, LENGTH)) < 0.3
PACKED = {"q_segment_ids": SEGMENTS, "kv_segment_ids": SEGMENTS}
PADDED = np.where(np.arange(LENGTH) < np.array([[29], [0]]), 1, 0)
"""A row of 29 tokens and an empty one, all of whose keys are hidden."""


def split_over(form: SplitForm, kv_heads: int, *, length: tuple[str, ...] = ("context",)) -> SequenceSharding:
    sizes = {"data": 1, "context": 4 // len(length), "more": len(length), "tensor": 2}
    grid = np.array(jax.devices()).reshape(tuple(sizes.values()))
    mesh = Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * 4)
    return SequenceSharding(mesh, ("data",), length, ("tensor",), () if kv_heads % 2 else ("tensor",), form)


def assert_same(
    mask: MaskSpec,
    split: SequenceSharding,
    *,
    bidirectional: bool | None = None,
    kv_heads: int = HEADS,
    keys: int = LENGTH,
    softcap: float | None = None,
    dynamic_window: bool = False,
    dtype: str = "float32",
    limits: tuple[float, float] = (1e-5, 1e-4),
    backend: AttentionBackend = FLASH,
) -> None:
    """Compare outputs and gradients; errors are relative to the largest number of each array.

    Args:
      mask: Mask.
      split: Placement.
      bidirectional: Kind of T5's bias; None: no bias.
      kv_heads: Number of key heads.
      keys: Number of keys.
      softcap: Soft cap of the scores.
      dynamic_window: The window is an array.
      dtype: Type of queries, keys and values.
      limits: Largest errors of outputs and of gradients.
      backend: Backend that attends to the split sequence.
    """
    random = np.random.default_rng(1)

    def numbers(*shape: int, dtype: str = dtype) -> Array:
        return jnp.asarray(random.normal(size=shape), dtype)

    q, weights = (numbers(ROWS, LENGTH, HEADS, WIDTH) for _ in range(2))
    k, v = (numbers(ROWS, keys, kv_heads, WIDTH) for _ in range(2))
    table = numbers(8, HEADS, dtype="float32")
    options = AttentionOptions(0.5, softcap, 0.0, None, dropout_broadcast_length=False)
    # A query without any visible key gets numbers that must be ignored.
    is_seen = np.ones((ROWS, 1, 1, 1), bool)
    if mask.kv_segment_ids is not None and mask.q_segment_ids is None:
        is_seen[:, 0, 0, 0] = np.any(np.asarray(mask.kv_segment_ids) != 0, axis=1)

    def loss(arrays: Any, backend: AttentionBackend, split: SequenceSharding | None) -> tuple[Array, Array]:
        q, k, v, table = arrays
        bias = None if bidirectional is None else RelativeBias(table, bidirectional, 20)
        prepared = backend.prepare_mask(mask, bias, LENGTH, keys, split)
        if dynamic_window and isinstance(prepared, BlockwiseMask):
            without = dataclasses.replace(mask, window=None)
            prepared = BlockwiseMask((KeySpec(without, bias, jnp.array(mask.window, jnp.int32)),), split)
        out = backend.attend(q, [k], [v], prepared, options)
        finite = jnp.where(is_seen, out, 0 * out)
        return jnp.sum((finite * weights).astype(jnp.float32)), finite

    found, expected = (
        jax.tree.leaves(
            jax.jit(jax.grad(functools.partial(loss, backend=backend, split=split), has_aux=True))((q, k, v, table))
        )
        for backend, split in ((backend, split), (ReferenceAttention(), None))
    )
    for a, b, limit in zip(found, expected, [*(limits[1],) * 4, limits[0]], strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=0, atol=limit * max(1e-3, float(np.abs(b).max())))


def test_ring_of_packed_causal_rows_with_bias_and_fewer_key_heads() -> None:
    assert_same(MaskSpec(causal=True, **PACKED), split_over("ring", 2), bidirectional=False, kv_heads=2)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ring", "all_gather"])
@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (MaskSpec(), {"bidirectional": True}),
        (MaskSpec(causal=True), {"kv_heads": 1, "softcap": 2.0}),
        (MaskSpec(causal=True, **PACKED, q_prefix=PREFIX, kv_prefix=PREFIX), {"bidirectional": True}),
        (MaskSpec(causal=True, window=(9, 0)), {"bidirectional": False}),
        (MaskSpec(window=(5, 3)), {"dynamic_window": True}),
        (MaskSpec(kv_segment_ids=PADDED[:, :20]), {"keys": 20, "kv_heads": 2}),
        (
            MaskSpec(causal=True),
            {"bidirectional": False, "dtype": "bfloat16", "limits": (0.02, 0.03)},
        ),
    ],
    ids=["all", "causal", "packed prefix", "window", "dynamic window", "cross", "bfloat16"],
)
def test_masks_and_features(form: SplitForm, mask: MaskSpec, options: dict[str, Any]) -> None:
    assert_same(mask, split_over(form, options.get("kv_heads", HEADS)), **options)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ring", "all_gather"])
@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (MaskSpec(causal=True, **PACKED, q_prefix=PREFIX, kv_prefix=PREFIX), {"bidirectional": True, "kv_heads": 2}),
        (MaskSpec(causal=True, window=(9, 0)), {"softcap": 2.0}),
    ],
    ids=["packed prefix", "window"],
)
def test_blocks_of_the_keys_of_a_pair(form: SplitForm, mask: MaskSpec, options: dict[str, Any]) -> None:
    split = split_over(form, options.get("kv_heads", HEADS))
    assert_same(mask, split, backend=BlockwiseAttention(kv_block=4), **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "mask", "options"),
    [
        ("ring", MaskSpec(causal=True, **PACKED, q_prefix=PREFIX, kv_prefix=PREFIX), {"bidirectional": True}),
        ("all_gather", MaskSpec(causal=True, window=(9, 0)), {"bidirectional": False, "kv_heads": 1}),
    ],
    ids=["ring", "all_gather"],
)
def test_kernels_of_gpus(form: SplitForm, mask: MaskSpec, options: dict[str, Any]) -> None:
    split = split_over(form, options.get("kv_heads", HEADS))
    assert_same(mask, split, backend=GpuFlashAttention(block=8, interpret=True), **options)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ring", "all_gather"])
def test_sequence_split_over_two_mesh_axes(form: SplitForm) -> None:
    split = split_over(form, HEADS, length=("context", "more"))
    assert_same(MaskSpec(causal=True, **PACKED), split, bidirectional=False)
