"""Attention of a few queries over remembered keys and values, which lie by head and may be int8.

What a step of decoding reads is memory: keys and values are read where they lie, whatever they are made of, and parts
that lie apart (a decoder's own and an encoder's) are read under one softmax without being put together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from t5x_like.kernels.masks import Prepared


class Part(NamedTuple):
    """Keys and values, and who sees them.

    Attributes:
      keys, values: [B, G, K, h]; float, or int8 with scales.
      key_scales, value_scales: float32 [B, G, K], or None.
      prepared: Mask [1 or B, 1, 1 or Q, K] and bias [1 or B, H, Q, K], either of them None.
    """

    keys: Array
    values: Array
    key_scales: Array | None
    value_scales: Array | None
    prepared: Prepared


def attend(q_BxQxHxh: Array, parts: Sequence[Part], *, scale: float, softcap: float | None = None) -> Array:
    """softmax(scale * q k + bias) v over the keys of all parts together, [B, Q, H, h]; the softmax is in float32.

    Query head i uses key and value head i // (H / G). Scores s become softcap * tanh(s / softcap) first, if asked for.
    """
    rows, q_length, heads, head_dim = q_BxQxHxh.shape
    kv_heads = parts[0].keys.shape[1]
    dtype = q_BxQxHxh.dtype
    q = (q_BxQxHxh * scale if scale != 1.0 else q_BxQxHxh).astype(dtype)
    q = jnp.swapaxes(q, 1, 2).reshape(rows, kv_heads, heads // kv_heads * q_length, head_dim)

    scores = [_scores(q, part, q_length, softcap) for part in parts]
    highest = jnp.max(scores[0], axis=-1, keepdims=True)
    for one in scores[1:]:
        highest = jnp.maximum(highest, jnp.max(one, axis=-1, keepdims=True))
    total = jnp.zeros_like(highest)
    mixed = jnp.zeros(q.shape, jnp.float32)
    for one, part in zip(scores, parts, strict=True):
        weights = jnp.exp(one - highest)
        total = total + jnp.sum(weights, axis=-1, keepdims=True)
        if part.value_scales is not None:
            weights = weights * part.value_scales[:, :, None]
        values = part.values.astype(dtype)
        mixed = mixed + jnp.einsum("bgmk,bgkh->bgmh", weights.astype(dtype), values, preferred_element_type=jnp.float32)
    out = (mixed / total).astype(dtype).reshape(rows, heads, q_length, head_dim)
    return jnp.swapaxes(out, 1, 2)


def _scores(q_BxGxMxh: Array, part: Part, q_length: int, softcap: float | None) -> Array:
    """float32 [B, G, M, K]; M counts the query heads of a key head and, within, the queries."""
    rows, kv_heads, queries, _ = q_BxGxMxh.shape
    kv_length = part.keys.shape[2]
    keys = part.keys.astype(q_BxGxMxh.dtype)
    scores = jnp.einsum("bgmh,bgkh->bgmk", q_BxGxMxh, keys, preferred_element_type=jnp.float32)
    if part.key_scales is not None:
        scores = scores * part.key_scales[:, :, None]
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    # As the mask and the bias know the queries: [B, G, heads of a key head, Q, K].
    shape = (rows, kv_heads, queries // q_length, q_length, kv_length)
    scores = scores.reshape(shape)
    if part.prepared.bias is not None:
        bias = part.prepared.bias
        scores = scores + bias.reshape(bias.shape[0], *shape[1:3], *bias.shape[2:])
    if part.prepared.mask is not None:
        scores = jnp.where(part.prepared.mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    return scores.reshape(rows, kv_heads, queries, kv_length)
