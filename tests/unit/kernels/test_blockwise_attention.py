"""Blockwise attention compared with the reference: outputs, all gradients, and memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from t5x_like.kernels.attention import attention
from t5x_like.kernels.attention_backend import AttentionBackend, AttentionOptions, AttentionRequest
from t5x_like.kernels.attention_masks import BlockwiseMask, KeySpec, MaskSpec, concat_masks, dense_mask, materialize
from t5x_like.kernels.blockwise_attention import BlockwiseAttention
from t5x_like.kernels.position_bias import RelativeBias
from t5x_like.kernels.reference_attention import ReferenceAttention
from t5x_like.kernels.rowwise_attention import RowwiseAttention

ROWS, HEADS, WIDTH = 2, 4, 8
BLOCKWISE = BlockwiseAttention(q_block=4, kv_block=8)
"""Blocks so small that rows of 19 tokens have several, and lengths that they do not divide."""
ROWWISE = (
    RowwiseAttention(q_short=4, scores=1),
    RowwiseAttention(q_block=4, kv_block=8, short=0, scores=1),
)
"""A row at a time, with static blocks and with loops over blocks."""
LENGTH = 19


def numbers(seed: int, *shape: int, dtype: str = "float32") -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def attend(
    backend: AttentionBackend,
    q: Array,
    keys: list[Array],
    values: list[Array],
    mask: MaskSpec,
    bias: RelativeBias | None,
    *,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    shared_dropout: bool = False,
) -> Array:
    """Attend to the first sequence of keys under `mask` and `bias`, and to all keys of further ones."""
    prepared = backend.prepare_mask(mask, bias, q.shape[1], keys[0].shape[1], None)
    for k in keys[1:]:
        further = backend.prepare_mask(MaskSpec(), None, q.shape[1], k.shape[1], None)
        prepared = concat_masks(prepared, keys[0].shape[1], further, k.shape[1])
    rng = jax.random.key(1) if dropout_rate else None
    options = AttentionOptions(0.5, softcap, dropout_rate, rng, shared_dropout)
    return backend.attend(q, keys, values, prepared, options)


def assert_close(found: Any, expected: Any, *, output: float = 1e-5, gradients: float = 1e-4) -> None:
    """Compare (output, gradients) with errors relative to the largest number of each array."""
    (out, *grads), (expected_out, *expected_grads) = jax.tree.leaves(found), jax.tree.leaves(expected)
    for a, b, limit in [
        (out, expected_out, output),
        *((a, b, gradients) for a, b in zip(grads, expected_grads, strict=True)),
    ]:
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=0, atol=limit * max(1e-3, float(np.abs(b).max())))


def assert_same(
    mask: MaskSpec,
    *,
    bidirectional: bool | None = None,
    lengths: tuple[int, ...] = (LENGTH, LENGTH),
    kv_heads: int = 2,
    dtype: str = "float32",
    output: float = 1e-5,
    gradients: float = 1e-4,
    **options: Any,
) -> None:
    """Compare with the reference for queries and sequences of keys of `lengths`."""
    q, weights = (numbers(seed, ROWS, lengths[0], HEADS, WIDTH, dtype=dtype) for seed in (0, 1))
    keys, values = (
        [numbers(seed + i, ROWS, length, kv_heads, WIDTH, dtype=dtype) for i, length in enumerate(lengths[1:])]
        for seed in (2, 4)
    )
    table = numbers(6, 8, HEADS)

    def loss(arrays: Any, backend: AttentionBackend) -> tuple[Array, Array]:
        q, keys, values, table = arrays
        bias = None if bidirectional is None else RelativeBias(table, bidirectional, 12)
        out = attend(backend, q, keys, values, mask, bias, **options)
        return jnp.sum((out * weights).astype(jnp.float32)), out

    def run(backend: AttentionBackend) -> Any:
        gradient = jax.jit(jax.grad(lambda arrays: loss(arrays, backend), has_aux=True))
        grads, out = gradient((q, keys, values, table))
        return out, grads

    expected = run(ReferenceAttention())
    for backend in (BLOCKWISE, *ROWWISE):
        assert_close(run(backend), expected, output=output, gradients=gradients)


def test_random_masks_with_every_feature() -> None:
    """Windows, prefixes and packed segments are arguments of one program, which also has T5's bias, a soft cap, dropout
    and fewer key heads."""
    q, weights = (numbers(seed, ROWS, LENGTH, HEADS, WIDTH) for seed in (0, 1))
    k, v, table = numbers(2, ROWS, LENGTH, 2, WIDTH), numbers(3, ROWS, LENGTH, 2, WIDTH), numbers(4, 8, HEADS)
    options = AttentionOptions(0.5, 2.0, 0.3, jax.random.key(1), dropout_broadcast_length=False)

    def program(is_blockwise: bool) -> Any:
        def loss(arrays: Any, mask: MaskSpec, window: Array) -> tuple[Array, Array]:
            q, k, v, table = arrays
            bias = RelativeBias(table, bidirectional=True, max_distance=12)
            if is_blockwise:
                out = BLOCKWISE.attend(q, [k], [v], BlockwiseMask((KeySpec(mask, bias, window),)), options)
            else:
                spec = dataclasses.replace(mask, window=(window[0], window[1]))  # type: ignore[arg-type]
                dense = dataclasses.replace(
                    materialize(MaskSpec(), bias, LENGTH, LENGTH), mask=dense_mask(spec, LENGTH, LENGTH)
                )
                out = ReferenceAttention().attend(q, [k], [v], dense, options)
            # A query without visible keys has a mean of values without dropout, which a model ignores.
            seen = jnp.any(dense_mask(dataclasses.replace(mask, window=(window[0], window[1])), LENGTH, LENGTH), axis=3)  # type: ignore[arg-type]
            out = jnp.where(seen[:, 0, :, None, None], out, 0.0)
            return jnp.sum(out * weights), out

        return jax.jit(jax.grad(loss, has_aux=True))

    blockwise, reference = program(True), program(False)
    random = np.random.default_rng(0)
    for _ in range(12):
        segments = np.sort(random.integers(0, random.integers(2, 5), (ROWS, LENGTH)), axis=1)
        prefix = random.random((ROWS, LENGTH)) < random.random()
        window = jnp.asarray(random.integers(0, LENGTH, 2), jnp.int32)
        mask = MaskSpec(causal=True, q_segment_ids=segments, kv_segment_ids=segments, q_prefix=prefix, kv_prefix=prefix)
        (found, out), (expected, expected_out) = (
            each((q, k, v, table), mask, window) for each in (blockwise, reference)
        )
        assert_close((out, found), (expected_out, expected))


def test_nan_in_a_query_is_nan_in_its_output() -> None:
    q = numbers(0, 1, 12, 2, WIDTH).at[0, 3].set(jnp.nan)
    k, v = numbers(1, 1, 12, 2, WIDTH), numbers(2, 1, 12, 2, WIDTH)
    out = np.isnan(attend(BLOCKWISE, q, [k], [v], MaskSpec(), None))
    assert out[0, 3].all() and not np.delete(out, 3, axis=1).any()


PADDED = np.where(np.arange(LENGTH) < np.array([[11], [0]]), 1, 0)
"""A row of 11 tokens and an empty one, all of whose keys are hidden."""


@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (MaskSpec(causal=True), {"bidirectional": False}),
        (MaskSpec(kv_segment_ids=PADDED), {"kv_heads": 4}),
        # The last queries are so far behind the keys that no block is in their window.
        (MaskSpec(window=(3, 2)), {"lengths": (LENGTH, 5), "bidirectional": True}),
    ],
    ids=["causal", "padding", "window"],
)
def test_masks_whose_form_is_static(mask: MaskSpec, options: dict[str, Any]) -> None:
    assert_same(mask, **options)


SEGMENTS = np.sort(np.random.default_rng(0).integers(0, 4, (ROWS, LENGTH)), axis=1)
POSITIONS = np.random.default_rng(1).integers(0, LENGTH, (ROWS, LENGTH))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (MaskSpec(causal=True, q_positions=POSITIONS, kv_positions=POSITIONS), {"bidirectional": True}),
        (MaskSpec(causal=True), {"lengths": (LENGTH, LENGTH, 10), "dropout_rate": 0.3}),
        (MaskSpec(causal=True, window=(5, 0)), {"dropout_rate": 0.5, "shared_dropout": True, "kv_heads": 1}),
        (
            MaskSpec(causal=True, q_segment_ids=SEGMENTS, kv_segment_ids=SEGMENTS),
            {"bidirectional": False, "dtype": "bfloat16", "output": 0.02, "gradients": 0.03},
        ),
        # One block of queries and one of keys: no loops.
        (MaskSpec(causal=True), {"lengths": (4, 7), "bidirectional": True}),
    ],
    ids=["positions", "merged", "shared dropout", "bfloat16", "one block"],
)
def test_further_masks_and_features(mask: MaskSpec, options: dict[str, Any]) -> None:
    assert_same(mask, **options)


def test_memory_grows_linearly_with_the_length() -> None:
    """Four times the length takes about four times the memory; the reference writes the scores and takes sixteen."""

    def temporary_bytes(length: int, backend: str) -> int:
        q = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        table = jax.ShapeDtypeStruct((32, 2), jnp.float32)

        def loss(q: Array, k: Array, v: Array, table: Array) -> Array:
            bias = RelativeBias(table, bidirectional=True, max_distance=128)

            # Two layers in a scan share the bias, as in a stack: it must not be kept for all blocks.
            def layer(q: Array, _: None) -> tuple[Array, None]:
                return attention(q, k, v, MaskSpec(), scale=1.0, relative_bias=bias, backend=backend), None

            return jnp.sum(jax.lax.scan(layer, q, None, length=2)[0])

        compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(q, q, q, table).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = (temporary_bytes(length, "blockwise") for length in (1024, 4096))
    assert long < 5 * short
    assert long < temporary_bytes(4096, "reference") / 10


def test_content_bias_is_refused() -> None:
    assert "disentangled" in str(BLOCKWISE.supports(AttentionRequest(bias="content")))
