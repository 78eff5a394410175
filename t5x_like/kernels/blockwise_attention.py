"""Attention in blocks of queries and keys, compiled by XLA: memory linear in the length, on every platform.

The forward pass is a loop over blocks of queries, and for each one a loop over the blocks of keys that its causal limit
and window reach; the softmax is computed online (`kernels.online_softmax`). The backward pass runs the same loops and
computes the scores again. Masks, T5's relative bias and dropout masks are made for one block at a time, and the
gradient of the bias table is added up block by block: no array of the size [B, H, Q, K] is made.

A query without any visible key gets the mean of all values, as in the reference, but without dropout.

Shape letters: B rows, G key heads, R query heads per key head, Q queries, K keys, x head width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from t5x_like.kernels.attention_backend import AttentionBackend, AttentionOptions, AttentionRequest
from t5x_like.kernels.attention_block import BlockInputs, BlockSetting, BlockShape, Keys, QueryBlock, padded_mask
from t5x_like.kernels.attention_masks import BlockwiseMask, Mask, MaskSpec, SequenceSharding
from t5x_like.kernels.context_attention import context_attention
from t5x_like.kernels.dropout import keep_mask
from t5x_like.kernels.einsum_chunks import EinsumChunks
from t5x_like.kernels.online_softmax import (
    HIDDEN,
    Sums,
    add_block,
    add_to_block,
    block_gradients,
    block_scores,
    correction,
    pad_to_blocks,
    slice_block,
)
from t5x_like.kernels.position_bias import RelativeBias, dense_bias

_KeysValues = tuple[Array, Array]
_Biases = tuple[RelativeBias | Array | None, ...]
"""T5's bias of each sequence of keys: a table, or for short rows the whole bias [1, H, Q, K], padded."""


class BlockwiseAttention(AttentionBackend):
    """Attention in blocks, also of queries and keys of several devices where the sequence is split.

    Attributes:
      q_block: Number of queries of a block.
      kv_block: Number of keys of a block.
    """

    is_portable = True
    recomputes_scores = True
    gathers_keys = True

    def __init__(self, q_block: int = 256, kv_block: int = 512) -> None:
        self.q_block, self.kv_block = q_block, kv_block

    def supports(self, request: AttentionRequest) -> str | None:
        if request.bias == "content":
            return 'it does not support disentangled positions; set attention="reference"'
        return None

    def prepare_mask(
        self,
        mask: MaskSpec,
        relative_bias: RelativeBias | None,
        q_length: int,
        kv_length: int,
        split: SequenceSharding | None,
    ) -> Mask:
        return BlockwiseMask.of(mask, relative_bias, split)

    def attend(
        self, q_BxQxHxh: Array, keys: Sequence[Array], values: Sequence[Array], mask: Mask, options: AttentionOptions
    ) -> Array:
        if not isinstance(mask, BlockwiseMask):
            raise ValueError("found a dense mask, expected the result of this backend's prepare_mask")
        q = q_BxQxHxh * options.scale if options.scale != 1.0 else q_BxQxHxh
        if mask.split is not None and mask.split.length:
            kvs = list(zip(keys, values, strict=True))
            return context_attention(q, kvs, mask, EinsumChunks(self.kv_block), options)
        return self._attend_in_blocks(q, keys, values, mask, options)

    def _attend_in_blocks(
        self, q: Array, keys: Sequence[Array], values: Sequence[Array], mask: BlockwiseMask, options: AttentionOptions
    ) -> Array:
        batch, q_length, heads, width = q.shape
        kv_heads = keys[0].shape[2]
        shape = self.block_shape(q.shape, tuple(k.shape[1] for k in keys), mask)
        setting = BlockSetting(
            shape,
            options.softcap,
            0.0 if options.dropout_rng is None else options.dropout_rate,
            options.dropout_broadcast_length,
        )
        # Heads first. Lengths are padded to whole blocks; the mask hides the padding among the keys.
        grouped = jnp.moveaxis(q.reshape(batch, q_length, kv_heads, heads // kv_heads, width), 1, 3)
        grouped = pad_to_blocks(grouped, 3, shape.q_block)
        kvs = tuple(
            tuple(pad_to_blocks(jnp.swapaxes(x, 1, 2), 2, block) for x in pair)
            for *pair, block in zip(keys, values, shape.kv_blocks, strict=True)
        )
        masks, windows = [], []
        for described, block in zip(mask.keys, shape.kv_blocks, strict=True):
            masks.append(padded_mask(described.mask, shape.q_block, block))
            windows.append(described.dynamic_window)
        biases: Any = tuple(described.relative_bias for described in mask.keys)
        rng, keep = options.dropout_rng, None
        if shape.joined_keys:
            # All rows use the same bias, and both passes the same dropout mask: they are made once.
            biases = tuple(
                _whole_bias(bias, each, grouped.shape[3], k.shape[2])
                for bias, each, (k, _) in zip(biases, masks, kvs, strict=True)
            )
            if rng is not None:
                keep = _whole_dropout_mask(rng, setting)
        inputs = BlockInputs(tuple(masks), tuple(windows), None if keep is not None else rng, keep)
        out = _attend(setting, grouped, kvs, biases, inputs)
        return jnp.moveaxis(out[:, :, :, :q_length], 3, 1).reshape(q.shape)

    def block_shape(self, q_shape: Sequence[int], kv_lengths: tuple[int, ...], mask: BlockwiseMask) -> BlockShape:
        """Return the sizes of the blocks for queries [B, Q, H, x]."""
        rows, q_length, heads, _ = q_shape
        q_block = block_size(q_length, self.q_block)
        kv_blocks = tuple(block_size(length, self.kv_block) for length in kv_lengths)
        return BlockShape(rows, heads, q_length, kv_lengths, rows, q_block, kv_blocks, joined_keys=0)


def _whole_bias(
    bias: RelativeBias | None, mask: MaskSpec, q_length: int, kv_length: int
) -> RelativeBias | Array | None:
    """Return T5's bias as an array [1, H, Q, K] if it is the same for all rows."""
    if bias is None or mask.q_positions is not None or mask.kv_positions is not None:
        return bias
    return dense_bias(bias, q_length, kv_length)


def _whole_dropout_mask(rng: Array, setting: BlockSetting) -> tuple[Array, ...]:
    """Return the dropout mask of each sequence of keys, [B, H, 1 or Q, K], padded to whole blocks.

    It is the mask that the reference draws for the same key.
    """
    shape = setting.shape
    queries = 1 if setting.shared_dropout else shape.q_length
    keep = keep_mask(rng, 1.0 - setting.dropout_rate, (shape.rows, shape.heads, queries, sum(shape.kv_lengths)))
    if not setting.shared_dropout:
        keep = pad_to_blocks(keep, 2, shape.q_block, value=True)
    parts = jnp.split(keep, np.cumsum(shape.kv_lengths)[:-1], axis=3)
    return tuple(pad_to_blocks(part, 3, block, value=True) for part, block in zip(parts, shape.kv_blocks, strict=True))


def block_size(length: int, limit: int) -> int:
    """Return the size of the fewest blocks of equal size, at most `limit`, that cover a length."""
    return math.ceil(length / math.ceil(length / limit)) if length else 1


def _mean_values(kvs: Sequence[_KeysValues], shape: BlockShape) -> Array:
    """Return the mean of all values, float32 [B, G, 1, 1, x]. Padding is 0 and adds nothing."""
    total = functools.reduce(jnp.add, (jnp.sum(v, axis=2, dtype=jnp.float32) for _, v in kvs))
    return (total / sum(shape.kv_lengths))[:, :, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(setting: BlockSetting, q: Array, kvs: Sequence[_KeysValues], biases: _Biases, inputs: BlockInputs) -> Array:
    return _forward(setting, q, kvs, biases, inputs)[0]


def _forward(
    setting: BlockSetting, q: Array, kvs: Sequence[_KeysValues], biases: _Biases, inputs: BlockInputs
) -> tuple[Array, Any]:
    def of_rows(first: Array | int, carry: None) -> tuple[None, tuple[Array, Array, Array]]:
        queries, keys_values = _part((q, kvs), first, setting.shape)
        return carry, _outputs(setting, queries, keys_values, biases, inputs.of_rows(first, setting.shape), first)

    _, (out, maximum, total) = _over_rows(of_rows, setting.shape, None)
    return out, (q, kvs, biases, inputs, out, maximum, total)


def _outputs(
    setting: BlockSetting,
    q: Array,
    kvs: Sequence[_KeysValues],
    biases: _Biases,
    inputs: BlockInputs,
    first_row: Array | int,
) -> tuple[Array, Array, Array]:
    """Return the outputs of some rows, and the largest score and the normalizer of each query."""
    shape = setting.shape
    mean = _mean_values(kvs, shape)

    def of_queries(start: Array | int, carry: None) -> tuple[None, tuple[Array, Array, Array]]:
        block = QueryBlock(setting, inputs, start, first_row)
        queries = slice_block(q, start, shape.q_block)
        sums = Sums.zeros_like(queries)
        for number in range(len(kvs)):

            def add(keys: Keys, sums: Sums) -> Sums:
                k, v = (slice_block(x, keys.start, keys.size) for x in kvs[keys.number])
                bias = block.bias(keys, biases[keys.number])
                scores = block_scores(queries, k, softcap=setting.softcap, bias=bias, visible=block.visible(keys))
                keep = block.keep(keys, scores.values)
                return add_block(sums, scores, v, keep=keep, dropout_rate=setting.dropout_rate)

            sums = block.over_keys(number, add, sums)
        # The largest score of a query without visible keys is that of a hidden one, or -inf if no block was read.
        # Ones in place of its sum keep the quotient finite. Scores that are NaN are no hidden ones: the output is NaN.
        unseen = sums.maximum <= HIDDEN
        total = jnp.where(unseen, 1.0, sums.total)
        out = jnp.where(unseen[..., None], mean, sums._replace(total=total).mean())
        return carry, (out.astype(q.dtype), sums.maximum, total)

    return _over_queries(of_queries, q.shape[3], shape, None)[1]


def _backward(setting: BlockSetting, residuals: Any, d_out: Array) -> tuple[Any, ...]:
    q, kvs, biases, inputs, *results = residuals
    # In float32, so that the gradient of the table is added up in float32.
    tables = tuple(None if bias is None else _numbers(bias).astype(jnp.float32) for bias in biases)

    def of_rows(first: Array | int, d_tables: Any) -> tuple[Any, Any]:
        queries, keys_values, *here = _part((q, kvs, *results, d_out), first, setting.shape)
        rows = (queries, keys_values, biases, inputs.of_rows(first, setting.shape), *here)
        return _gradients(setting, rows, tables, d_tables, first)

    zeros = jax.tree.map(jnp.zeros_like, tables)
    d_tables, (d_q, d_kvs) = _over_rows(of_rows, setting.shape, zeros)
    d_biases = tuple(
        None if bias is None else _with_numbers(bias, d_table.astype(_numbers(bias).dtype))
        for bias, d_table in zip(biases, d_tables, strict=True)
    )
    return d_q, d_kvs, d_biases, None


def _gradients(
    setting: BlockSetting, rows: Any, tables: tuple[Array | None, ...], d_tables: Any, first_row: Array | int
) -> tuple[Any, Any]:
    """Return `d_tables` plus the gradients of the tables, and those of queries, keys and values of some rows."""
    q, kvs, biases, inputs, out, maximum, total, d_out = rows
    shape = setting.shape
    unseen = maximum <= HIDDEN
    # With 0 as largest score the weights of hidden keys are 0; the gradient of the mean of all values is added below.
    statistics = (jnp.where(unseen, 0.0, maximum), total, correction(out, d_out))

    def of_queries(start: Array | int, carry: Any) -> tuple[Any, Array]:
        block = QueryBlock(setting, inputs, start, first_row)
        queries, d_outs = slice_block(q, start, shape.q_block), slice_block(d_out, start, shape.q_block)
        here: Any = tuple(slice_block(x[..., None], start, shape.q_block)[..., 0] for x in statistics)
        d_kvs, d_tables = carry
        d_kvs, d_tables = list(d_kvs), list(d_tables)
        d_q = jnp.zeros(queries.shape, jnp.float32)
        for number in range(len(kvs)):

            def add(keys: Keys, sums: Any) -> Any:
                d_q, (d_k, d_v), d_table = sums
                k, v = (slice_block(x, keys.start, keys.size) for x in kvs[keys.number])
                bias, add_gradient = _bias_and_gradient(block, keys, biases[keys.number], tables[keys.number])
                visible = block.visible(keys)
                scores = block_scores(queries, k, softcap=setting.softcap, bias=bias, visible=visible)
                keep = block.keep(keys, scores.values)
                gradients = block_gradients(
                    *(queries, k, v, d_outs, scores, here),
                    visible=visible,
                    keep=keep,
                    dropout_rate=setting.dropout_rate,
                )
                if bias is not None:
                    d_bias = gradients.scores.reshape(shape.row_block, -1, *bias.shape[2:])
                    if bias.shape[0] == 1:
                        d_bias = jnp.sum(d_bias, axis=0, keepdims=True)
                    d_table = add_gradient(d_table, d_bias)
                return (
                    d_q + gradients.q,
                    (add_to_block(d_k, gradients.k, keys.start), add_to_block(d_v, gradients.v, keys.start)),
                    d_table,
                )

            sums = (d_q, d_kvs[number], d_tables[number])
            d_q, d_kvs[number], d_tables[number] = block.over_keys(number, add, sums)
        return (tuple(d_kvs), tuple(d_tables)), d_q.astype(q.dtype)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tuple(kvs))
    (d_kvs, d_tables), d_q = _over_queries(of_queries, q.shape[3], shape, (zeros, d_tables))
    d_mean = jnp.sum(jnp.where(unseen[..., None], d_out.astype(jnp.float32), 0.0), axis=(2, 3)) / sum(shape.kv_lengths)
    d_kvs = tuple(
        (d_k.astype(k.dtype), (d_v + d_mean[:, :, None]).astype(v.dtype))
        for (d_k, d_v), (k, v) in zip(d_kvs, kvs, strict=True)
    )
    return d_tables, (d_q, d_kvs)


_attend.defvjp(_forward, _backward)


def _numbers(bias: RelativeBias | Array) -> Array:
    return bias.table if isinstance(bias, RelativeBias) else bias


def _with_numbers(bias: RelativeBias | Array, numbers: Array) -> RelativeBias | Array:
    return dataclasses.replace(bias, table=numbers) if isinstance(bias, RelativeBias) else numbers


def _bias_and_gradient(
    block: QueryBlock, keys: Keys, bias: RelativeBias | Array | None, numbers: Array | None
) -> tuple[Array | None, Callable[[Array, Array], Array]]:
    """Return the bias of a block, and a function that adds the gradient of that bias to the gradient of `numbers`."""
    if isinstance(bias, RelativeBias):
        of_block, gradient = jax.vjp(lambda table: block.bias(keys, _with_numbers(bias, table)), numbers)
        return of_block, lambda total, d_bias: total + gradient(d_bias)[0]

    def add(total: Array, d_bias: Array) -> Array:
        start = (0, 0, block.start, keys.start)
        return jax.lax.dynamic_update_slice(total, jax.lax.dynamic_slice(total, start, d_bias.shape) + d_bias, start)

    return block.bias(keys, numbers), add


def _part(arrays: Any, first: Array | int, shape: BlockShape) -> Any:
    """Return `shape.row_block` rows from `first` on of each array of a tree."""
    if shape.row_block == shape.rows:
        return arrays
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, shape.row_block), arrays)


def _over_rows(of_rows: Callable[[Any, Any], Any], shape: BlockShape, carry: Any) -> tuple[Any, Any]:
    """Run `of_rows` for each block of rows; return the carry, and its results [b, ...] joined along the rows."""
    if shape.row_block == shape.rows:
        return of_rows(0, carry)
    firsts = jnp.arange(0, shape.rows, shape.row_block)
    carry, results = jax.lax.scan(lambda carry, first: of_rows(first, carry), carry, firsts)
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)


def _over_queries(of_queries: Callable[[Any, Any], Any], padded: int, shape: BlockShape, carry: Any) -> tuple[Any, Any]:
    """Run `of_queries` for each block of the padded queries.

    Returns:
      The carry, and the results [B, G, R, q, ...] joined along the queries.
    """
    starts = range(0, padded, shape.q_block)
    if len(starts) == 1 or shape.joined_keys:
        blocks = []
        for start in starts:
            carry, block = of_queries(start, carry)
            blocks.append(block)
        return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=3), *blocks)
    carry, results = jax.lax.scan(lambda carry, start: of_queries(start, carry), carry, jnp.asarray(starts))

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 3)
        return x.reshape(*x.shape[:3], -1, *x.shape[5:])

    return carry, jax.tree.map(join, results)
