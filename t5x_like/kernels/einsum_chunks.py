"""Attention of a chunk of queries with a chunk of keys by einsums, which hold the scores of the pair at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from t5x_like.kernels.attention_masks import KeySpec, dense_mask
from t5x_like.kernels.context_device import ChunkAttention, ChunkGradients, DeviceBlock, Pair
from t5x_like.kernels.online_softmax import Scores, Sums, add_block, block_gradients, block_scores
from t5x_like.kernels.position_bias import dense_bias


@dataclasses.dataclass(frozen=True)
class EinsumChunks(ChunkAttention):
    """Scores, masks and biases of a pair as arrays."""

    def add(self, here: DeviceBlock, pair: Pair, sums: Sums, q: Array, k: Array, v: Array) -> Sums:
        keys, softcap = here.key_spec(pair), here.setting.softcap
        bias, visible = _bias(keys, pair, None), _visible(keys, pair)
        scores = block_scores(q, k, softcap=softcap, bias=bias, visible=visible)
        keep = here.keep(pair, scores.values.shape)
        return add_block(sums, scores, v, keep=keep, dropout_rate=here.setting.dropout_rate)

    def gradients(
        self,
        here: DeviceBlock,
        pair: Pair,
        q: Array,
        k: Array,
        v: Array,
        d_out: Array,
        statistics: tuple[Array, Array, Array],
    ) -> ChunkGradients:
        keys, softcap = here.key_spec(pair), here.setting.softcap
        visible = _visible(keys, pair)
        bias = table_gradient = None
        if keys.relative_bias is not None:
            table = keys.relative_bias.table
            bias, table_gradient = jax.vjp(lambda table: _bias(keys, pair, table), table)
        scores: Scores = block_scores(q, k, softcap=softcap, bias=bias, visible=visible)
        gradients = block_gradients(
            *(q, k, v, d_out, scores, statistics),
            visible=visible,
            keep=here.keep(pair, scores.values.shape),
            dropout_rate=here.setting.dropout_rate,
        )
        d_table = None
        if table_gradient is not None:
            d_bias = jnp.sum(gradients.scores, axis=0).reshape(1, -1, *scores.values.shape[3:])
            d_table = table_gradient(d_bias.astype(table.dtype))[0]
        return ChunkGradients(gradients.q, gradients.k, gradients.v, d_table)


def _bias(keys: KeySpec, pair: Pair, table: Array | None) -> Array | None:
    """Return T5's bias of the pair, [1, h, q, k], with another table if one is given."""
    bias = keys.relative_bias
    if bias is None:
        return None
    if table is not None:
        bias = dataclasses.replace(bias, table=table)
    # Index of the first key minus that of the first query, in the whole sequence; the bias needs differences only.
    return dense_bias(bias, pair.q_length, pair.kv_length, offset=pair.kv_start - pair.q_start)


def _visible(keys: KeySpec, pair: Pair) -> Array | None:
    """Return the mask, bool [1 or b, 1, 1, 1 or q, k], or None if every key is visible."""
    dynamic = keys.dynamic_window
    window: Any = keys.mask.window if dynamic is None else (dynamic[0], dynamic[1])
    mask = dataclasses.replace(
        keys.mask,
        window=window,
        q_positions=(pair.q_start + jnp.arange(pair.q_length))[None],
        kv_positions=(pair.kv_start + jnp.arange(pair.kv_length))[None],
    )
    dense = dense_mask(mask, pair.q_length, pair.kv_length)
    return None if dense is None else dense[:, :, None]
