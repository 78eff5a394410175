"""Attention whose keys and values go round, against attention on one device: what comes out, and every gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import AxisType, Mesh

from t5x_like.kernels.attention import attention
from t5x_like.kernels.masks import MaskSpec, RelativeBias, Split, after_another, masks_together, of_kind, prepare
from t5x_like.kernels.random import keep_mask, keep_mask_block

ROWS, LENGTH, HEADS, WIDTH = 4, 16, 4, 8
RANDOM = np.random.default_rng(0)
SEGMENTS = np.sort(RANDOM.integers(0, 4, (ROWS, LENGTH)), axis=1)
PREFIX = RANDOM.random((ROWS, LENGTH)) < 0.3
PACKED = {"q_segment_ids": SEGMENTS, "kv_segment_ids": SEGMENTS}


def split_over(*, kv_heads: tuple[str, ...] = ("tensor",), length: tuple[str, ...] = ("context",)) -> Split:
    sizes = {"data": 1 if len(length) > 1 else 2, "context": 2, "more": len(length), "tensor": 2}
    grid = np.array(jax.devices()).reshape(tuple(sizes.values()))
    return Split(Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * 4), ("data",), length, ("tensor",), kv_heads)


def numbers(*shape: int) -> Array:
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


def assert_same(
    mask: MaskSpec,
    split: Split,
    *,
    bidirectional: bool | None = None,
    kv_heads: int = HEADS,
    keys: int = LENGTH,
    others: int = 0,
    **options: Any,
) -> None:
    """With T5's bias if `bidirectional` is said, and `others` more keys of another sequence."""
    q, table, weights = numbers(ROWS, LENGTH, HEADS, WIDTH), numbers(8, HEADS), numbers(ROWS, LENGTH, HEADS, WIDTH)
    lengths = [keys, others] if others else [keys]
    ks, vs = ([numbers(ROWS, length, kv_heads, WIDTH) for length in lengths] for _ in range(2))

    def loss(arrays: Any, split: Split | None) -> tuple[Array, Array]:
        q, ks, vs, table = arrays
        bias = None if bidirectional is None else RelativeBias(table, bidirectional, 20)
        prepared = prepare(mask, bias, LENGTH, keys, split)
        if others:
            prepared = after_another(prepared, keys, prepare(MaskSpec(), None, LENGTH, others, split), others)
        out = attention(q, ks, vs, prepared, scale=0.5, dropout_rng=jax.random.key(1), **options)
        return jnp.sum(out * weights), out

    found, expected = (
        jax.jit(jax.value_and_grad(lambda arrays, split=where: loss(arrays, split), has_aux=True))((q, ks, vs, table))
        for where in (split, None)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_packed_prefixes_with_bias_and_fewer_key_heads() -> None:
    mask = MaskSpec(causal=True, **PACKED, q_prefix=PREFIX, kv_prefix=PREFIX)
    assert_same(mask, split_over(), bidirectional=True, kv_heads=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (MaskSpec(), {}),
        (MaskSpec(causal=True), {"bidirectional": False}),
        (MaskSpec(causal=True, window=(3, 1)), {"kv_heads": 2, "softcap": 2.0}),
        (MaskSpec(kv_segment_ids=SEGMENTS[:, :8]), {"keys": 8}),
        (MaskSpec(causal=True), {"others": 8, "dropout_rate": 0.3}),
        (MaskSpec(causal=True), {"others": 8, "dropout_rate": 0.3, "dropout_broadcast_length": True}),
        (MaskSpec(causal=True), {"dropout_rate": 0.3, "dropout_broadcast_length": True, "kv_heads": 2}),
        (MaskSpec(kv_segment_ids=SEGMENTS[:, :10]), {"keys": 10, "dropout_rate": 0.5}),
    ],
    ids=["all", "causal", "window", "cross", "merged", "merged_values_dropped", "keys_dropped", "odd_block_dropped"],
)
def test_masks(mask: MaskSpec, options: dict[str, Any]) -> None:
    assert_same(mask, split_over(), **options)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_key_heads_that_are_whole_where_query_heads_are_split(kv_heads: int) -> None:
    assert_same(MaskSpec(causal=True), split_over(kv_heads=()), kv_heads=kv_heads, bidirectional=False)


@pytest.mark.slow
def test_a_sequence_over_two_axes() -> None:
    assert_same(MaskSpec(causal=True, **PACKED), split_over(length=("context", "more")), bidirectional=False)


def test_windows_of_several_kinds_of_layers_are_numbers_to_choose_from() -> None:
    masks = [MaskSpec(causal=True, window=(3, 0)), MaskSpec(causal=True)]
    described = [prepare(mask, None, LENGTH, LENGTH, split_over()) for mask in masks]
    together = masks_together(described, LENGTH, LENGTH)
    np.testing.assert_array_equal(together, [[3, 0], [2**30, 2**30]])
    chosen = of_kind(described[0], together[1])
    assert chosen.keys[0].mask.window is None and chosen.split == described[0].split


@pytest.mark.parametrize("last", [12, 13])
def test_a_part_of_a_dropout_mask_is_that_of_the_whole(last: int) -> None:
    """Also beyond 2**32 cells, where the numbers of words take two words."""
    key, starts, block = jax.random.key(3), (1, 2, 5), (2, 3, 6)
    whole = keep_mask(key, 0.7, (4, 6, last))
    part = keep_mask_block(key, 0.7, (4, 6, last), starts, block)
    np.testing.assert_array_equal(part, whole[1:3, 2:5, 5:11])
    assert 0.5 < part.mean() < 0.9

    huge = (2**20, 2**16, 2**4)
    far = keep_mask_block(key, 0.5, huge, (2**19 + 3, 2**15 + 1, 3), (4, 8, 8))
    again = keep_mask_block(key, 0.5, (2**19 + 8, *huge[1:]), (2**19 + 3, 2**15 + 5, 0), (4, 4, 16))
    np.testing.assert_array_equal(far[:, 4:], again[:, :, 3:11])
    near = keep_mask_block(key, 0.5, huge, (3, 2**15 + 1, 3), (4, 8, 8))
    assert (near != far).any(), "rows 2**39 words apart"
