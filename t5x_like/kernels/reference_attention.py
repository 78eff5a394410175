"""Attention by einsums, and by the ring where the sequence is split over devices: supports everything."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from t5x_like.kernels.attention_backend import AttentionOptions, AttentionRequest, DenseMaskBackend
from t5x_like.kernels.attention_masks import BlockwiseMask, DenseMask, Mask
from t5x_like.kernels.context_attention import context_attention
from t5x_like.kernels.dropout import keep_mask
from t5x_like.kernels.einsum_chunks import EinsumChunks


class ReferenceAttention(DenseMaskBackend):
    """Attention by einsums with a softmax in float32."""

    is_portable = True
    materializes_scores = True
    recomputes_scores = True

    def supports(self, request: AttentionRequest) -> str | None:
        return None

    def attend(
        self, q_BxQxHxh: Array, keys: Sequence[Array], values: Sequence[Array], mask: Mask, options: AttentionOptions
    ) -> Array:
        q = q_BxQxHxh * options.scale if options.scale != 1.0 else q_BxQxHxh
        if isinstance(mask, BlockwiseMask):
            return context_attention(q, list(zip(keys, values, strict=True)), mask, EinsumChunks(), options)
        return _einsum_attention(q, join_sequences(keys), join_sequences(values), mask, options)


def join_sequences(sequences: Sequence[Array]) -> Array:
    """Return the sequences [B, K, G, h] as one, joined along their length."""
    return sequences[0] if len(sequences) == 1 else jnp.concatenate(sequences, axis=1)


def _einsum_attention(
    q_BxQxHxh: Array, k_BxKxGxh: Array, v_BxKxGxh: Array, mask: DenseMask, options: AttentionOptions
) -> Array:
    batch, q_length, heads, head_dim = q_BxQxHxh.shape
    kv_length, kv_heads = k_BxKxGxh.shape[1:3]
    # Query heads as [G, R]: key head g serves the R query heads of its group.
    grouped = (kv_heads, heads // kv_heads)
    keep = None
    if options.dropout_rng is not None:
        # Drawn outside of the checkpoint, so that the backward pass reads the mask and does not draw it again.
        keep_shape = (batch, *grouped, 1 if options.dropout_broadcast_length else q_length, kv_length)
        keep = keep_mask(options.dropout_rng, 1.0 - options.dropout_rate, keep_shape)

    # The backward pass computes the probabilities again: less work than to write and read [B, H, Q, K] once.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend(q: Array, k: Array, v: Array, mask: DenseMask, keep: Array | None) -> Array:
        # The product of bfloat16 inputs is accumulated and returned in float32: a score of 10 rounded to bfloat16 would
        # be off by up to 0.03, and its probability by 3 %.
        scores = jnp.einsum("bqgrh,bkgh->bgrqk", q, k, preferred_element_type=jnp.float32)
        if options.softcap is not None:
            scores = options.softcap * jnp.tanh(scores / options.softcap)
        if mask.bias is not None:
            bias = mask.bias
            scores = scores + bias.reshape(bias.shape[0], *grouped, *bias.shape[2:])
        if mask.mask is not None:
            # The smallest finite number and not -inf: a query without visible keys gets a mean instead of NaN.
            scores = jnp.where(mask.mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
        # The second product runs in the type of the inputs: it is a mean over the keys, which does not amplify rounding
        # errors.
        probabilities = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
        if keep is not None:
            probabilities = jnp.where(keep, probabilities / (1.0 - options.dropout_rate), 0).astype(probabilities.dtype)
        return jnp.einsum("bgrqk,bkgh->bqgrh", probabilities, v)

    q = q_BxQxHxh.reshape(batch, q_length, *grouped, head_dim)
    return attend(q, k_BxKxGxh, v_BxKxGxh, mask, keep).reshape(q_BxQxHxh.shape)
