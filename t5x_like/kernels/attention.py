"""Attention behind one function. Masks and T5's relative bias are described, not built, by the caller.

A backend turns the description into what it needs (`masks.prepare`), once for all layers that share it, and attends.
The backends here materialise: an additive bias [1 or B, H, Q, K] and a mask that is as small as the description allows,
[1 or B, 1, 1 or Q, K].
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from t5x_like.kernels.masks import Described, Mask, MaskSpec, Prepared, RelativeBias, prepare
from t5x_like.kernels.random import keep_mask
from t5x_like.kernels.ring import ring_attention

Implementation = Literal["reference", "xla", "cudnn"]


def attention(
    q_BxQxHxh: Array,
    k_BxKxGxh: Array | Sequence[Array],
    v_BxKxGxh: Array | Sequence[Array],
    mask: MaskSpec | Mask,
    *,
    scale: float,
    softcap: float | None = None,
    relative_bias: RelativeBias | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    dropout_broadcast_length: bool = False,
    implementation: Implementation = "reference",
) -> Array:
    """softmax(scale * q k + bias) v over the keys that the mask shows; the softmax is in float32.

    Query head i uses key and value head i // (H / G).

    Args:
      k_BxKxGxh, v_BxKxGxh: Keys and values; or those of several sequences, which count as one after the other.
      mask: Who sees whom; or that and the bias, prepared by `prepare`, which decides whether the sequence is split over
        devices.
      softcap: Scores s become softcap * tanh(s / softcap) before bias and mask, as in Gemma 2; "reference" only.
      relative_bias: T5's bias; not with a prepared mask.
      dropout_rate: Of the probabilities; without dropout_rng there is none.
      dropout_broadcast_length: One dropout mask [B, H, 1, K] for all queries, as in T5X.
      implementation: "reference" (einsums), "xla" (`jax.nn.dot_product_attention`) or "cudnn" (the same function on
        NVIDIA's kernels, half precision only). The last two can drop probabilities only where the mask is shared over
        queries and H = G. A sequence that is split over devices is attended to by `ring_attention`, whatever is named.

    Returns:
      [B, Q, H, h] in the type of q.

    Raises:
      ValueError: H is no multiple of G, or the backend cannot do what is asked.
    """
    keys, values = _sequences(k_BxKxGxh), _sequences(v_BxKxGxh)
    lengths = [k.shape[1] for k in keys]
    heads, kv_heads = q_BxQxHxh.shape[2], keys[0].shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are no multiple of {kv_heads} key and value heads")
    if isinstance(mask, MaskSpec):
        mask = prepare(mask, relative_bias, q_BxQxHxh.shape[1], sum(lengths))
    if dropout_rate == 0.0:
        dropout_rng = None
    if dropout_rng is not None and dropout_broadcast_length and heads == kv_heads:
        # sum_k p_qk m_k v_k: a mask without a query axis belongs to the values, which are far fewer numbers.
        keep = keep_mask(dropout_rng, 1.0 - dropout_rate, (values[0].shape[0], sum(lengths), kv_heads, 1))
        parts = jnp.split(keep, np.cumsum(lengths)[:-1], axis=1)
        values = [
            jnp.where(part, v / (1.0 - dropout_rate), 0).astype(v.dtype) for part, v in zip(parts, values, strict=True)
        ]
        dropout_rng = None
    if isinstance(mask, Described):
        return ring_attention(
            q_BxQxHxh * scale if scale != 1.0 else q_BxQxHxh,
            list(zip(keys, values, strict=True)),
            mask,
            softcap=softcap,
            dropout_rate=dropout_rate,
            dropout_rng=dropout_rng,
            dropout_broadcast_length=dropout_broadcast_length,
        )
    k_BxKxGxh, v_BxKxGxh = (x[0] if len(x) == 1 else jnp.concatenate(x, axis=1) for x in (keys, values))
    if implementation == "reference":
        return _reference(
            q_BxQxHxh,
            k_BxKxGxh,
            v_BxKxGxh,
            mask,
            scale=scale,
            softcap=softcap,
            dropout_rate=dropout_rate,
            dropout_rng=dropout_rng,
            dropout_broadcast_length=dropout_broadcast_length,
        )
    if softcap is not None:
        raise ValueError(f'attention="{implementation}" has no softcap: set attention="reference"')
    if dropout_rng is not None:
        raise ValueError(
            f'attention="{implementation}" cannot drop single probabilities (dropout_rate {dropout_rate}): set '
            "dropout_broadcast_length=True with as many key heads as query heads, dropout_rate=0 or "
            'attention="reference"'
        )
    return jax.nn.dot_product_attention(
        q_BxQxHxh,
        k_BxKxGxh,
        v_BxKxGxh,
        bias=None if mask.bias is None else mask.bias.astype(q_BxQxHxh.dtype),
        mask=mask.mask,
        scale=scale,
        implementation=implementation,
    )


def _sequences(x: Array | Sequence[Array]) -> list[Array]:
    return [x] if isinstance(x, Array) else list(x)


def _reference(
    q_BxQxHxh: Array,
    k_BxKxGxh: Array,
    v_BxKxGxh: Array,
    prepared: Prepared,
    *,
    scale: float,
    softcap: float | None,
    dropout_rate: float,
    dropout_rng: Array | None,
    dropout_broadcast_length: bool,
) -> Array:
    rows, q_length, heads, head_dim = q_BxQxHxh.shape
    kv_length, kv_heads = k_BxKxGxh.shape[1:3]
    shape = (kv_heads, heads // kv_heads)
    keep = None
    if dropout_rng is not None:
        keep_shape = (rows, *shape, 1 if dropout_broadcast_length else q_length, kv_length)
        keep = keep_mask(dropout_rng, 1.0 - dropout_rate, keep_shape)

    # The backward pass computes the probabilities again: less work than to write and read [B, H, Q, K] once.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend(q: Array, k: Array, v: Array, prepared: Prepared, keep: Array | None) -> Array:
        scores = jnp.einsum("bqgrh,bkgh->bgrqk", q, k, preferred_element_type=jnp.float32)
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        if prepared.bias is not None:
            bias = prepared.bias
            scores = scores + bias.reshape(bias.shape[0], *shape, *bias.shape[2:])
        if prepared.mask is not None:
            scores = jnp.where(prepared.mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
        probabilities = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
        if keep is not None:
            probabilities = jnp.where(keep, probabilities / (1.0 - dropout_rate), 0).astype(probabilities.dtype)
        return jnp.einsum("bgrqk,bkgh->bqgrh", probabilities, v)

    q = (q_BxQxHxh * scale if scale != 1.0 else q_BxQxHxh).reshape(rows, q_length, *shape, head_dim)
    return attend(q, k_BxKxGxh, v_BxKxGxh, prepared, keep).reshape(q_BxQxHxh.shape)
