"""Attention of a chunk of queries with a chunk of keys by einsums."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from t5x_like.kernels.attention_masks import KeySpec, dense_mask
from t5x_like.kernels.context_device import ChunkAttention, ChunkGradients, DeviceBlock, Pair, if_needed
from t5x_like.kernels.online_softmax import (
    Scores,
    Sums,
    add_block,
    add_to_block,
    block_gradients,
    block_scores,
    loop_over_blocks,
    slice_block,
)
from t5x_like.kernels.position_bias import dense_bias


@dataclasses.dataclass(frozen=True)
class EinsumChunks(ChunkAttention):
    """Scores, masks and biases as arrays, of all keys of a pair or of one block of them at a time.

    Attributes:
      kv_block: Largest number of keys of a block, whose size divides that of the chunk; None: the whole chunk.
    """

    kv_block: int | None = None

    def add(self, here: DeviceBlock, pair: Pair, sums: Sums, q: Array, k: Array, v: Array) -> Sums:
        block = self._block(pair.kv_length)

        def add_keys(j: Any, sums: Sums) -> Sums:
            part = _part(pair, j, block)

            def compute(sums: Sums) -> Sums:
                keys = here.key_spec(part)
                scores, _ = _scores(here, part, keys, q, slice_block(k, j * block, block))
                keep = here.keep(part, scores.values.shape)
                values = slice_block(v, j * block, block)
                return add_block(sums, scores, values, keep=keep, dropout_rate=here.setting.dropout_rate)

            return compute(sums) if part is pair else if_needed(here.is_needed(part), j == 0, compute, sums)

        return loop_over_blocks(0, pair.kv_length // block, add_keys, sums)

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
        block = self._block(pair.kv_length)

        def add_keys(j: Any, sums: ChunkGradients) -> ChunkGradients:
            part = _part(pair, j, block)

            def compute(sums: ChunkGradients) -> ChunkGradients:
                keys, values = (slice_block(x, j * block, block) for x in (k, v))
                added = _block_gradients(here, part, q, keys, values, d_out, statistics)
                return ChunkGradients(
                    sums.q + added.q,
                    add_to_block(sums.k, added.k, j * block),
                    add_to_block(sums.v, added.v, j * block),
                    None if sums.table is None or added.table is None else sums.table + added.table,
                )

            return compute(sums) if part is pair else if_needed(here.is_needed(part), j == 0, compute, sums)

        table = here.tables.get(f"table_{pair.number}")
        d_q, d_k, d_v = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
        d_table = None if table is None else jnp.zeros(table.shape, jnp.float32)
        zeros = ChunkGradients(d_q, d_k, d_v, d_table)
        return loop_over_blocks(0, pair.kv_length // block, add_keys, zeros)

    def _block(self, kv_length: int) -> int:
        """Return the number of keys of a block: the largest divisor of their number up to the limit."""
        limit = kv_length if self.kv_block is None else min(self.kv_block, kv_length)
        return next(size for size in range(limit, 0, -1) if kv_length % size == 0)


def _part(pair: Pair, j: Any, block: int) -> Pair:
    """Return the pair of all queries with a block of the keys."""
    if block == pair.kv_length:
        return pair
    return dataclasses.replace(pair, kv_start=pair.kv_start + j * block, kv_length=block)


def _scores(
    here: DeviceBlock, pair: Pair, keys: KeySpec, q: Array, k: Array, bias: Array | None = None
) -> tuple[Scores, Array | None]:
    """Return the scores of a pair and its mask."""
    visible = _visible(keys, pair)
    bias = _bias(keys, pair, None) if bias is None else bias
    return block_scores(q, k, softcap=here.setting.softcap, bias=bias, visible=visible), visible


def _block_gradients(
    here: DeviceBlock,
    pair: Pair,
    q: Array,
    k: Array,
    v: Array,
    d_out: Array,
    statistics: tuple[Array, Array, Array],
) -> ChunkGradients:
    """Return what a pair adds to the gradients; arguments as in `ChunkAttention.gradients`."""
    keys = here.key_spec(pair)
    bias = table_gradient = None
    if keys.relative_bias is not None:
        bias, table_gradient = jax.vjp(lambda table: _bias(keys, pair, table), keys.relative_bias.table)
    scores, visible = _scores(here, pair, keys, q, k, bias)
    gradients = block_gradients(
        *(q, k, v, d_out, scores, statistics),
        visible=visible,
        keep=here.keep(pair, scores.values.shape),
        dropout_rate=here.setting.dropout_rate,
    )
    d_table = None
    if table_gradient is not None and bias is not None:
        d_bias = jnp.sum(gradients.scores, axis=0).reshape(1, -1, *scores.values.shape[3:])
        d_table = table_gradient(d_bias.astype(bias.dtype))[0]
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
