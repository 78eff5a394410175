"""Splash attention, interpreted on CPUs, compared with the reference: outputs and all gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from t5x_like.kernels.attention import attention
from t5x_like.kernels.attention_backend import AttentionBackend, AttentionOptions, AttentionRequest
from t5x_like.kernels.attention_masks import MaskSpec, SequenceSplit
from t5x_like.kernels.reference_attention import ReferenceAttention
from t5x_like.kernels.splash_attention import SplashAttention

ROWS, HEADS, WIDTH, LENGTH = 2, 2, 16, 200
SPLASH = SplashAttention(block=128, interpret=True)
"""Rows of 200 tokens have two blocks of 128, which do not divide them."""
SEGMENTS = np.sort(np.random.default_rng(0).integers(1, 4, (ROWS, LENGTH)), axis=1)
PADDED = np.where(np.arange(LENGTH) < np.array([[150], [60]]), 1, 0)


def numbers(seed: int, *shape: int, dtype: str = "float32") -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_same(
    mask: MaskSpec,
    *,
    lengths: tuple[int, int] = (LENGTH, LENGTH),
    kv_heads: int = 1,
    softcap: float | None = None,
    dtype: str = "float32",
    output: float = 1e-5,
    gradients: float = 1e-4,
) -> None:
    """Compare with the reference; errors are relative to the largest number of each array."""
    q, weights = (numbers(seed, ROWS, lengths[0], HEADS, WIDTH, dtype=dtype) for seed in (0, 1))
    k, v = (numbers(seed, ROWS, lengths[1], kv_heads, WIDTH, dtype=dtype) for seed in (2, 3))
    options = AttentionOptions(0.5, softcap, 0.0, None, dropout_broadcast_length=False)

    def loss(arrays: Any, backend: AttentionBackend) -> tuple[Array, Array]:
        q, k, v = arrays
        out = backend.attend(q, [k], [v], backend.prepare_mask(mask, None, *lengths, None), options)
        return jnp.sum((out * weights).astype(jnp.float32)), out

    found, expected = (
        jax.jit(jax.grad(lambda arrays, backend=backend: loss(arrays, backend), has_aux=True))((q, k, v))
        for backend in (SPLASH, ReferenceAttention())
    )
    limits = [*(gradients,) * 3, output]
    for a, b, limit in zip(jax.tree.leaves(found), jax.tree.leaves(expected), limits, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=0, atol=limit * float(np.abs(b).max()))


def test_packed_causal_rows_equal_the_reference() -> None:
    assert_same(MaskSpec(causal=True, q_segment_ids=SEGMENTS, kv_segment_ids=SEGMENTS), softcap=2.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (MaskSpec(), {"lengths": (LENGTH, 140), "kv_heads": 2}),
        (MaskSpec(kv_segment_ids=PADDED), {}),
        (MaskSpec(window=(40, 30)), {}),
        (MaskSpec(causal=True, window=(30, 7)), {}),
        # The last block of keys is seen by no query.
        (MaskSpec(causal=True), {"lengths": (100, LENGTH)}),
        (MaskSpec(causal=True), {"dtype": "bfloat16", "output": 0.02, "gradients": 0.03}),
    ],
    ids=["cross", "padded", "window", "causal window", "more keys", "bfloat16"],
)
def test_further_masks(mask: MaskSpec, options: dict[str, Any]) -> None:
    assert_same(mask, **options)


@pytest.mark.slow
def test_a_row_without_visible_keys_is_finite() -> None:
    q = numbers(0, 1, 130, HEADS, WIDTH)
    mask = MaskSpec(kv_segment_ids=np.zeros((1, 130), np.int32))
    options = AttentionOptions(1.0, None, 0.0, None, dropout_broadcast_length=False)

    def loss(q: Array) -> Array:
        return jnp.sum(SPLASH.attend(q, [q], [q], SPLASH.prepare_mask(mask, None, 130, 130, None), options))

    value, gradient = jax.value_and_grad(loss)(q)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_what_the_kernels_lack_is_refused() -> None:
    for request, reason in [
        (AttentionRequest(bias="content"), "disentangled"),
        (AttentionRequest(bias="relative"), 'attention="flash"'),
        (AttentionRequest(dropout_rate=0.1), "dropout_broadcast_length=True"),
        (AttentionRequest(dynamic_window=True), "several windows"),
        (AttentionRequest(is_merged=True), "several sequences"),
        (AttentionRequest(split=SequenceSplit("ring", 2)), 'attention="flash"'),
        (AttentionRequest(split=SequenceSplit("all_gather", 2)), 'attention="flash"'),
        (AttentionRequest(has_prefix=True), "prefix"),
        (AttentionRequest(has_positions=True), "explicit positions"),
    ]:
        assert reason in str(SPLASH.supports(request))
    q = jnp.zeros((1, 8, 2, 8))
    prefix = jnp.ones((1, 8), bool)
    with pytest.raises(ValueError, match="a prefix differs between rows"):
        attention(q, q, q, MaskSpec(causal=True, q_prefix=prefix, kv_prefix=prefix), scale=1.0, backend="splash")
    with pytest.raises(ValueError, match="as many keys as queries"):
        attention(q, q[:, :4], q[:, :4], MaskSpec(window=(3, 0)), scale=1.0, backend="splash")
