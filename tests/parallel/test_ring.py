"""Ring attention compared with attention on one device: outputs and all gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import AxisType, Mesh

from t5x_like.kernels.attention import attention
from t5x_like.kernels.attention_masks import (
    BlockwiseMask,
    Mask,
    MaskSpec,
    SequenceSharding,
    SplitForm,
    concat_masks,
    materialize,
    select_mask,
    stack_masks,
)
from t5x_like.kernels.dropout import keep_mask, keep_mask_block
from t5x_like.kernels.position_bias import RelativeBias

ROWS, LENGTH, HEADS, WIDTH = 4, 16, 4, 8
RANDOM = np.random.default_rng(0)
SEGMENTS = np.sort(RANDOM.integers(0, 4, (ROWS, LENGTH)), axis=1)
PREFIX = RANDOM.random((ROWS, LENGTH)) < 0.3
PACKED = {"q_segment_ids": SEGMENTS, "kv_segment_ids": SEGMENTS}


def split_over(
    *, kv_heads: tuple[str, ...] = ("tensor",), length: tuple[str, ...] = ("context",), form: SplitForm = "ring"
) -> SequenceSharding:
    sizes = {"data": 1 if len(length) > 1 else 2, "context": 2, "more": len(length), "tensor": 2}
    grid = np.array(jax.devices()).reshape(tuple(sizes.values()))
    return SequenceSharding(
        Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * 4), ("data",), length, ("tensor",), kv_heads, form
    )


def numbers(*shape: int) -> Array:
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


def prepare(mask: MaskSpec, bias: RelativeBias | None, keys: int, split: SequenceSharding | None) -> Mask:
    return materialize(mask, bias, LENGTH, keys) if split is None else BlockwiseMask.of(mask, bias, split)


def assert_same(
    mask: MaskSpec,
    split: SequenceSharding,
    *,
    bidirectional: bool | None = None,
    kv_heads: int = HEADS,
    keys: int = LENGTH,
    others: int = 0,
    **options: Any,
) -> None:
    """Compare outputs and gradients, with T5's bias if `bidirectional` is given and `others` keys of a source."""
    q, table, weights = numbers(ROWS, LENGTH, HEADS, WIDTH), numbers(8, HEADS), numbers(ROWS, LENGTH, HEADS, WIDTH)
    lengths = [keys, others] if others else [keys]
    ks, vs = ([numbers(ROWS, length, kv_heads, WIDTH) for length in lengths] for _ in range(2))

    def loss(arrays: Any, split: SequenceSharding | None) -> tuple[Array, Array]:
        q, ks, vs, table = arrays
        bias = None if bidirectional is None else RelativeBias(table, bidirectional, 20)
        prepared = prepare(mask, bias, keys, split)
        if others:
            prepared = concat_masks(prepared, keys, prepare(MaskSpec(), None, others, split), others)
        out = attention(q, ks, vs, prepared, scale=0.5, dropout_rng=jax.random.key(1), **options)
        return jnp.sum(out * weights), out

    actual, expected = (
        jax.jit(jax.value_and_grad(lambda arrays, split=variant: loss(arrays, split), has_aux=True))((q, ks, vs, table))
        for variant in (split, None)
    )
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
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
def test_ring_supports_all_masks(mask: MaskSpec, options: dict[str, Any]) -> None:
    assert_same(mask, split_over(), **options)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_replicated_key_heads_with_split_query_heads(kv_heads: int) -> None:
    assert_same(MaskSpec(causal=True), split_over(kv_heads=()), kv_heads=kv_heads, bidirectional=False)


@pytest.mark.slow
def test_gathered_keys_of_two_sequences_with_dropout() -> None:
    assert_same(MaskSpec(causal=True), split_over(form="all_gather"), others=8, dropout_rate=0.3)


@pytest.mark.slow
def test_sequence_split_over_two_mesh_axes() -> None:
    assert_same(MaskSpec(causal=True, **PACKED), split_over(length=("context", "more")), bidirectional=False)


def test_windows_of_several_layer_kinds_are_stacked_as_numbers() -> None:
    masks = [MaskSpec(causal=True, window=(3, 0)), MaskSpec(causal=True)]
    blockwise = [BlockwiseMask.of(mask, None, split_over()) for mask in masks]
    together = stack_masks(blockwise, LENGTH, LENGTH)
    np.testing.assert_array_equal(together, [[3, 0], [2**30, 2**30]])
    chosen = select_mask(blockwise[0], together[1])
    assert chosen.keys[0].mask.window is None and chosen.split == blockwise[0].split


@pytest.mark.parametrize("last", [12, 13])
def test_block_of_a_dropout_mask_equals_that_of_the_whole_mask(last: int) -> None:
    """Blocks are also equal beyond 2**32 elements, where counters take two words."""
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
