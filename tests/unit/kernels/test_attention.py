"""Attention and masks, compared with definitions written as loops."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.kernels.attention import attention
from t5x_like.kernels.attention_masks import MaskSpec, dense_mask, materialize
from t5x_like.kernels.position_bias import RelativeBias, relative_position_buckets

ROWS, QUERIES, KEYS = 3, 7, 7


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def truth(spec: MaskSpec, rows: int, queries: int, keys: int) -> np.ndarray:
    """Return the mask by the definition of `MaskSpec`, pair by pair."""
    seen = np.zeros((rows, queries, keys), bool)
    for b in range(rows):
        for i in range(queries):
            for j in range(keys):
                q = i if spec.q_positions is None else spec.q_positions[b, i]
                k = j if spec.kv_positions is None else spec.kv_positions[b, j]
                ok = True
                if spec.causal and k > q:
                    ok = spec.q_prefix is not None and bool(spec.q_prefix[b, i] and spec.kv_prefix[b, j])
                if spec.window is not None and not -spec.window[1] <= q - k <= spec.window[0]:
                    ok = False
                if spec.kv_segment_ids is not None:
                    wanted = spec.kv_segment_ids[b, j]
                    ok = ok and (wanted != 0 if spec.q_segment_ids is None else wanted == spec.q_segment_ids[b, i])
                seen[b, i, j] = ok
    return seen


def specs():
    random = np.random.default_rng(0)
    segments = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1], [1, 2, 2, 3, 3, 3, 0]], np.int32)
    positions = np.array([[0, 1, 2, 0, 1, 0, 0], [3, 1, 4, 1, 5, 9, 2], [0, 0, 1, 0, 1, 2, 0]], np.int32)
    prefix = random.random((ROWS, KEYS)) < 0.5
    return {
        "all": MaskSpec(),
        "causal": MaskSpec(causal=True),
        "window": MaskSpec(window=(2, 1)),
        "causal window": MaskSpec(causal=True, window=(2, 2)),
        "padding": MaskSpec(kv_segment_ids=segments),
        "segments": MaskSpec(q_segment_ids=segments, kv_segment_ids=segments),
        "causal segments": MaskSpec(causal=True, q_segment_ids=segments, kv_segment_ids=segments),
        "positions": MaskSpec(causal=True, window=(3, 0), q_positions=positions, kv_positions=positions),
        "prefix": MaskSpec(causal=True, q_prefix=prefix, kv_prefix=prefix),
        "packed prefix": MaskSpec(
            causal=True,
            q_positions=positions,
            kv_positions=positions,
            q_segment_ids=segments,
            kv_segment_ids=segments,
            q_prefix=prefix,
            kv_prefix=prefix,
        ),
    }


@pytest.mark.parametrize("name", specs())
def test_dense_mask_matches_the_definition(name):
    spec = specs()[name]
    found = dense_mask(spec, QUERIES, KEYS)
    found = np.ones((1, 1, 1, KEYS), bool) if found is None else np.asarray(found)
    np.testing.assert_array_equal(np.broadcast_to(found[:, 0], (ROWS, QUERIES, KEYS)), truth(spec, ROWS, QUERIES, KEYS))


def test_padding_mask_has_no_query_axis():
    """A padding mask costs [B, K], not [B, Q, K]."""
    mask = dense_mask(MaskSpec(kv_segment_ids=jnp.ones((ROWS, KEYS), jnp.int32)), 1000, KEYS)
    assert mask is not None and mask.shape == (ROWS, 1, 1, KEYS)


def t5_bucket(relative_position: int, bidirectional: bool, buckets: int, max_distance: int) -> int:
    """Return T5's bucket of one distance in Python's arithmetic."""
    bucket, n = 0, -relative_position
    if bidirectional:
        buckets //= 2
        bucket = buckets if n < 0 else 0
        n = abs(n)
    n = max(n, 0)
    exact = buckets // 2
    if n < exact:
        return bucket + n
    return bucket + min(
        exact + int(math.log(n / exact) / math.log(max_distance / exact) * (buckets - exact) + 1e-9), buckets - 1
    )


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets,max_distance", [(32, 128), (21, 128), (64, 256), (128, 512)])
def test_relative_position_buckets_equal_t5(bidirectional, buckets, max_distance):
    distances = np.arange(-1500, 1501)
    found = relative_position_buckets(
        jnp.asarray(distances), bidirectional=bidirectional, num_buckets=buckets, max_distance=max_distance
    )
    expected = [t5_bucket(int(d), bidirectional, buckets, max_distance) for d in distances]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("queries,keys", [(7, 7), (3, 9), (9, 3), (1, 5)])
def test_bias_by_index_equals_bias_by_explicit_positions(queries, keys):
    bias = RelativeBias(jnp.asarray(numbers(1, 32, 4)), bidirectional=True, max_distance=20)
    spelled = MaskSpec(q_positions=np.arange(queries)[None], kv_positions=np.arange(keys)[None])
    by_cell, by_position = (
        jax.jit(lambda spec=spec: materialize(spec, bias, queries, keys).bias)() for spec in (MaskSpec(), spelled)
    )
    assert by_cell.shape == (1, 4, queries, keys)
    np.testing.assert_array_equal(by_cell, by_position)


def loops(q, k, v, seen, bias, scale):
    """Compute attention in float64, head by head; query head i reads key head i // (H / G)."""
    rows, queries, heads, _ = q.shape
    out = np.zeros(q.shape)
    for b in range(rows):
        for h in range(heads):
            g = h // (heads // k.shape[2])
            scores = scale * q[b, :, h].astype(np.float64) @ k[b, :, g].T + bias[b, h]
            for i in range(queries):
                weights = np.where(seen[b, i], np.exp(scores[i] - scores[i][seen[b, i]].max()), 0.0)
                out[b, i, h] = weights / weights.sum() @ v[b, :, g]
    return out


@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_matches_the_definition(backend, kv_heads):
    q, k, v = numbers(0, ROWS, QUERIES, 4, 8), numbers(1, ROWS, KEYS, kv_heads, 8), numbers(2, ROWS, KEYS, kv_heads, 8)
    spec = specs()["packed prefix"]
    table = RelativeBias(jnp.asarray(numbers(3, 32, 4)), bidirectional=True, max_distance=128)
    distance = spec.kv_positions[:, None, :] - spec.q_positions[:, :, None]
    buckets = relative_position_buckets(distance, bidirectional=True, num_buckets=32, max_distance=128)
    bias = np.moveaxis(np.asarray(table.table)[np.asarray(buckets)], -1, 1)
    attend = jax.jit(functools.partial(attention, scale=0.3, backend=backend))
    found = attend(q, k, v, spec, relative_bias=table)
    np.testing.assert_allclose(found, loops(q, k, v, truth(spec, ROWS, QUERIES, KEYS), bias, 0.3), atol=2e-6)


def test_backends_have_the_same_gradients():
    q, k, v = numbers(0, 2, 6, 4, 8), numbers(1, 2, 6, 2, 8), numbers(2, 2, 6, 2, 8)
    table = jnp.asarray(numbers(3, 8, 4))

    def loss(arguments, backend):
        q, k, v, table = arguments
        bias = RelativeBias(table, bidirectional=False, max_distance=16)
        out = attention(q, k, v, MaskSpec(causal=True), scale=1.0, relative_bias=bias, backend=backend)
        return jnp.sum(out * numbers(4, *q.shape))

    reference, xla = (
        jax.jit(jax.grad(loss), static_argnums=1)((q, k, v, table), name) for name in ("reference", "xla")
    )
    for found, expected in zip(xla, reference, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_query_without_visible_keys_gives_finite_output_and_gradients(backend):
    q, k, v = numbers(0, 1, 2, 2, 4), numbers(1, 1, 3, 2, 4), numbers(2, 1, 3, 2, 4)
    spec = MaskSpec(kv_segment_ids=jnp.zeros((1, 3), jnp.int32))

    def out(arguments):
        return attention(*arguments, spec, scale=1.0, backend=backend)

    value, gradients = jax.jit(jax.value_and_grad(lambda arguments: out(arguments).sum()))((q, k, v))
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("broadcast", [True, False])
def test_dropout_has_the_rate_and_preserves_the_mean(broadcast, kv_heads):
    """With values of one-hot keys the output is the dropped probabilities themselves."""
    rows, queries, keys, rate = 64, 4, 32, 0.25
    q = jnp.zeros((rows, queries, 4, keys))
    k = jnp.zeros((rows, keys, kv_heads, keys))
    v = jnp.broadcast_to(jnp.eye(keys)[None, :, None], (rows, keys, kv_heads, keys))
    attend = functools.partial(attention, scale=1.0, dropout_rate=rate, dropout_broadcast_length=broadcast)
    probabilities = jax.jit(attend)(q, k, v, MaskSpec(), dropout_rng=jax.random.key(0))
    kept = np.asarray(probabilities) > 0
    np.testing.assert_allclose(np.asarray(probabilities)[kept], 1 / keys / (1 - rate), rtol=1e-5)
    independent = rows * keys * 4 * (1 if broadcast else queries)
    assert abs(kept.mean() - (1 - rate)) < 4 * math.sqrt(rate * (1 - rate) / independent)
    shared_over_queries = (kept == kept[:, :1]).all()
    assert shared_over_queries == broadcast
    assert not (kept[:, :, :1] == kept).all(), "heads must have masks of their own"


def test_library_backends_refuse_dropout_of_single_probabilities():
    q = jnp.zeros((1, 2, 2, 4))
    with pytest.raises(ValueError, match="dropout_broadcast_length=True"):
        attention(q, q, q, MaskSpec(), scale=1.0, dropout_rate=0.1, dropout_rng=jax.random.key(0), backend="xla")
