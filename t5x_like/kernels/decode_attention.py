"""Attention of a few queries over cached keys and values, which are stored by head and may be int8.

A decoding step is bound by memory traffic. Keys and values are therefore read where they are stored, in their own type,
and segments that are stored apart (those of the decoder and of the encoder) are read under one softmax without being
concatenated. This kernel is used for decoding steps whatever attention backend the model names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from t5x_like.kernels.attention_masks import DenseMask


class KVSegment(NamedTuple):
    """Cached keys and values with their mask.

    A segment may have P rows side by side for each row of the queries, P B in all: a query then attends to the keys of
    all P rows. Beam search needs this, whose queries find parts of their past in the rows of other beams.

    Attributes:
      keys: [P B, G, K, h]; float, or int8 with scales.
      values: [P B, G, K, h]; float, or int8 with scales.
      key_scales: float32 [P B, G, K], or None for floats.
      value_scales: float32 [P B, G, K], or None for floats.
      mask: Mask [1 or P B, 1, 1 or Q, K] and bias [1 or P B, H, 1 or Q, K]; either may be None.
    """

    keys: Array
    values: Array
    key_scales: Array | None
    value_scales: Array | None
    mask: DenseMask


def attend(q_BxQxHxh: Array, segments: Sequence[KVSegment], *, scale: float, softcap: float | None = None) -> Array:
    """Return softmax(scale * q k + bias) v over the keys of all segments together; the softmax is in float32.

    Query head i uses key and value head i // (H / G).

    Args:
      q_BxQxHxh: Queries.
      segments: Cached keys and values.
      scale: Factor on the products of queries and keys.
      softcap: Scores s become softcap * tanh(s / softcap) before bias and mask; None: no soft cap.

    Returns:
      [B, Q, H, h] in the type of q.
    """
    batch, q_length, heads, head_dim = q_BxQxHxh.shape
    kv_heads = segments[0].keys.shape[1]
    dtype = q_BxQxHxh.dtype
    # Scaling the queries costs Q * h products per head, scaling the scores Q * K.
    q = (q_BxQxHxh * scale if scale != 1.0 else q_BxQxHxh).astype(dtype)
    # [B, G, M, h]: the query heads of a key head and their queries form one matrix, M = H / G * Q.
    q = jnp.swapaxes(q, 1, 2).reshape(batch, kv_heads, heads // kv_heads * q_length, head_dim)

    # One softmax over all segments: the maximum of all scores, then sums over the segments.
    scores = [_scores(_repeated(q, segment), segment, q_length, softcap) for segment in segments]
    # Without the subtraction of the maximum, exp overflows float32 for scores above 88.
    maximum = _over_rows(jnp.max, jnp.max(scores[0], axis=-1, keepdims=True), batch)
    for segment_scores in scores[1:]:
        maximum = jnp.maximum(maximum, _over_rows(jnp.max, jnp.max(segment_scores, axis=-1, keepdims=True), batch))
    total = jnp.zeros_like(maximum)
    weighted = jnp.zeros(q.shape, jnp.float32)
    for segment_scores, segment in zip(scores, segments, strict=True):
        # The maximum is that of all segments, so the exponentials of different segments have one scale and can be
        # added.
        weights = jnp.exp(segment_scores - _repeated(maximum, segment))
        total = total + _over_rows(jnp.sum, jnp.sum(weights, axis=-1, keepdims=True), batch)
        if segment.value_scales is not None:
            # Scale the weights, one number per key, and not the values, head_dim numbers per key.
            weights = weights * segment.value_scales[:, :, None]
        values = segment.values.astype(dtype)
        mixed = jnp.einsum("bgmk,bgkh->bgmh", weights.astype(dtype), values, preferred_element_type=jnp.float32)
        weighted = weighted + _over_rows(jnp.sum, mixed, batch)
    # Dividing the weighted sum at the end takes h divisions per query instead of K.
    out = (weighted / total).astype(dtype).reshape(batch, heads, q_length, head_dim)
    return jnp.swapaxes(out, 1, 2)


def _repeated(x_Bx: Array, segment: KVSegment) -> Array:
    """Return [P B, ...], a row of [B, ...] for each row of the segment."""
    count = segment.keys.shape[0] // x_Bx.shape[0]
    if count == 1:
        return x_Bx
    return jnp.broadcast_to(x_Bx[:, None], (x_Bx.shape[0], count, *x_Bx.shape[1:])).reshape(-1, *x_Bx.shape[1:])


def _over_rows(reduce: Callable[..., Array], x: Array, batch: int) -> Array:
    """Return [B, ...], [P B, ...] reduced over the P rows of each query."""
    return x if x.shape[0] == batch else reduce(x.reshape(batch, -1, *x.shape[1:]), axis=1)


def _scores(q_BxGxMxh: Array, segment: KVSegment, q_length: int, softcap: float | None) -> Array:
    """Return masked scores, float32 [B, G, M, K]; M counts the query heads of a key head and, within, the queries."""
    batch, kv_heads, queries, _ = q_BxGxMxh.shape
    kv_length = segment.keys.shape[2]
    keys = segment.keys.astype(q_BxGxMxh.dtype)
    scores = jnp.einsum("bgmh,bgkh->bgmk", q_BxGxMxh, keys, preferred_element_type=jnp.float32)
    # The scale of a key is common to its head_dim numbers, so it can be applied to the score: K products instead of K *
    # h, and the keys stay int8 in memory.
    if segment.key_scales is not None:
        scores = scores * segment.key_scales[:, :, None]
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    # Bias and mask have separate dimensions for heads and queries: [B, G, H / G, Q, K].
    shape = (batch, kv_heads, queries // q_length, q_length, kv_length)
    scores = scores.reshape(shape)
    if segment.mask.bias is not None:
        bias = segment.mask.bias
        scores = scores + bias.reshape(bias.shape[0], *shape[1:3], *bias.shape[2:])
    if segment.mask.mask is not None:
        scores = jnp.where(segment.mask.mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    return scores.reshape(batch, kv_heads, queries, kv_length)
