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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from t5x_like.kernels.attention_backend import AttentionBackend, AttentionOptions, AttentionRequest
from t5x_like.kernels.attention_masks import BlockwiseMask, Mask, MaskSpec, SequenceSharding, dense_mask
from t5x_like.kernels.context_attention import context_attention
from t5x_like.kernels.dropout import keep_mask_block
from t5x_like.kernels.einsum_chunks import EinsumChunks
from t5x_like.kernels.online_softmax import (
    HIDDEN,
    Sums,
    add_block,
    add_to_block,
    block_gradients,
    block_scores,
    correction,
    loop_over_blocks,
    pad_to_blocks,
    slice_block,
)
from t5x_like.kernels.position_bias import RelativeBias, dense_bias

_ARRAYS = ("positions", "segment_ids", "prefix")
"""Arrays of a mask, one for the queries and one for the keys each."""
_KeysValues = tuple[Array, Array]
_Biases = tuple[RelativeBias | None, ...]


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
        lengths = tuple(k.shape[1] for k in keys)
        shape = _Shape(
            q_length,
            lengths,
            min(self.q_block, q_length),
            tuple(min(self.kv_block, length) for length in lengths),
        )
        setting = _Setting(
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
            masks.append(_padded_mask(described.mask, shape.q_block, block))
            windows.append(described.dynamic_window)
        biases = tuple(described.relative_bias for described in mask.keys)
        inputs = _Inputs(tuple(masks), tuple(windows), options.dropout_rng)
        out = _attend(setting, grouped, kvs, biases, inputs)
        return jnp.moveaxis(out[:, :, :, :q_length], 3, 1).reshape(q.shape)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Lengths of queries and of each sequence of keys without padding, and the sizes of their blocks."""

    q_length: int
    kv_lengths: tuple[int, ...]
    q_block: int
    kv_blocks: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Setting:
    """Static part of a call; hashable, so that `custom_vjp` takes it as an argument that is not differentiated."""

    shape: _Shape
    softcap: float | None
    dropout_rate: float
    shared_dropout: bool


@functools.partial(jax.tree_util.register_dataclass, data_fields=["masks", "windows", "rng"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class _Inputs:
    """Arrays without gradients: padded masks and dynamic windows of each sequence of keys, and the dropout key."""

    masks: tuple[MaskSpec, ...]
    windows: tuple[Array | None, ...]
    rng: Array | None


def _padded_mask(mask: MaskSpec, q_block: int, kv_block: int) -> MaskSpec:
    """Return a mask whose arrays are padded to whole blocks."""
    blocks = {"q": q_block, "kv": kv_block}
    changes: dict[str, Any] = {
        f"{side}_{name}": pad_to_blocks(jnp.asarray(x), 1, block)
        for side, block in blocks.items()
        for name in _ARRAYS
        if (x := getattr(mask, f"{side}_{name}")) is not None
    }
    return dataclasses.replace(mask, **changes)


class _Block:
    """One block of queries, and what its scores with blocks of keys need beside queries and keys.

    Attributes:
      start: Index of the first query.
    """

    def __init__(self, setting: _Setting, inputs: _Inputs, index: Array | int, rows: int, heads: int):
        self.setting, self.inputs, self.shape = setting, inputs, setting.shape
        self.start = index * self.shape.q_block
        self.rows, self.heads = rows, heads

    def kv_range(self, number: int) -> tuple[Array | int, Array | int]:
        """Return the first block of keys that the causal limit and the window can reach, and the one after the last.

        Only indices tell: with explicit positions all blocks are read.
        """
        mask, window, block = self.inputs.masks[number], self.inputs.windows[number], self.shape.kv_blocks[number]
        count = -(-self.shape.kv_lengths[number] // block)
        if mask.q_positions is not None or mask.kv_positions is not None:
            return 0, count
        last = self.start + self.shape.q_block - 1
        low: list[Any] = [0]
        high: list[Any] = [count]
        if mask.causal and (mask.q_prefix is None or mask.kv_prefix is None):
            high.append(last // block + 1)
        limits: Any = mask.window if window is None else window
        if limits is not None:
            low.append((self.start - limits[0]) // block)
            high.append((last + limits[1]) // block + 1)
        if all(isinstance(x, int) for x in (*low, *high)):
            return max(low), min(high)
        return functools.reduce(jnp.maximum, low), functools.reduce(jnp.minimum, high)

    def bias(self, number: int, bias: RelativeBias | None, index: Array | int) -> Array | None:
        """Return T5's bias of these queries and a block of keys, [1 or B, H, q, k], if there is a bias."""
        if bias is None:
            return None
        mask, block = self.inputs.masks[number], self.shape.kv_blocks[number]
        if mask.q_positions is None and mask.kv_positions is None:
            return dense_bias(bias, self.shape.q_block, block, offset=index * block - self.start)
        here = self._mask(number, index)
        return dense_bias(bias, self.shape.q_block, block, q_positions=here.q_positions, kv_positions=here.kv_positions)

    def visible(self, number: int, index: Array | int) -> Array | None:
        """Return the mask of these queries and a block of keys, bool [1 or B, 1, 1, 1 or q, k]; None: all visible."""
        block, length = self.shape.kv_blocks[number], self.shape.kv_lengths[number]
        visible = dense_mask(self._mask(number, index), self.shape.q_block, block)
        if length % block:
            inside = (index * block + jnp.arange(block) < length)[None, None, None]
            visible = inside if visible is None else visible & inside
        return None if visible is None else visible[:, :, None]

    def _mask(self, number: int, index: Array | int) -> MaskSpec:
        """Return the mask of these queries and a block of keys; its positions are given."""
        mask, window, block = self.inputs.masks[number], self.inputs.windows[number], self.shape.kv_blocks[number]

        def of(side: str, name: str) -> Array | None:
            x = getattr(mask, f"{side}_{name}")
            start, size = (self.start, self.shape.q_block) if side == "q" else (index * block, block)
            if x is None:
                return (start + jnp.arange(size))[None] if name == "positions" else None
            return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

        arrays: dict[str, Any] = {f"{side}_{name}": of(side, name) for side in ("q", "kv") for name in _ARRAYS}
        if window is not None:
            arrays["window"] = (window[0], window[1])
        return dataclasses.replace(mask, **arrays)

    def keep(self, number: int, index: Array | int, scores: Array) -> Array | None:
        """Return the part of the dropout mask of all scores that belongs to a block of `scores`; None: no dropout.

        It is the mask that the reference draws for the same key.
        """
        if self.setting.dropout_rate == 0.0:
            return None
        assert self.inputs.rng is not None
        shape, shared = self.shape, self.setting.shared_dropout
        keep = keep_mask_block(
            self.inputs.rng,
            1.0 - self.setting.dropout_rate,
            (self.rows, self.heads, 1 if shared else shape.q_length, sum(shape.kv_lengths)),
            (0, 0, 0 if shared else self.start, sum(shape.kv_lengths[:number]) + index * shape.kv_blocks[number]),
            (self.rows, self.heads, 1 if shared else shape.q_block, shape.kv_blocks[number]),
        )
        return keep.reshape(*scores.shape[:3], *keep.shape[2:])


def _mean_values(kvs: Sequence[_KeysValues], shape: _Shape) -> Array:
    """Return the mean of all values, float32 [B, G, 1, 1, x]. Padding is 0 and adds nothing."""
    total = functools.reduce(jnp.add, (jnp.sum(v, axis=2, dtype=jnp.float32) for _, v in kvs))
    return (total / sum(shape.kv_lengths))[:, :, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(setting: _Setting, q: Array, kvs: Sequence[_KeysValues], biases: _Biases, inputs: _Inputs) -> Array:
    return _forward(setting, q, kvs, biases, inputs)[0]


def _forward(
    setting: _Setting, q: Array, kvs: Sequence[_KeysValues], biases: _Biases, inputs: _Inputs
) -> tuple[Array, Any]:
    shape = setting.shape
    rows, groups, repeats = q.shape[:3]
    mean = _mean_values(kvs, shape)

    def of_queries(index: Array | int, carry: None) -> tuple[None, tuple[Array, Array, Array]]:
        block = _Block(setting, inputs, index, rows, groups * repeats)
        queries = slice_block(q, index, shape.q_block)
        sums = Sums.zeros_like(queries)
        for number in range(len(kvs)):

            def add(j: Any, sums: Sums, number: int = number) -> Sums:
                k, v = (slice_block(x, j, shape.kv_blocks[number]) for x in kvs[number])
                bias = block.bias(number, biases[number], j)
                visible = block.visible(number, j)
                scores = block_scores(queries, k, softcap=setting.softcap, bias=bias, visible=visible)
                keep = block.keep(number, j, scores.values)
                return add_block(sums, scores, v, keep=keep, dropout_rate=setting.dropout_rate)

            sums = loop_over_blocks(*block.kv_range(number), add, sums)
        # The largest score of a query without visible keys is that of a hidden one, or -inf if no block was read.
        # Ones in place of its sum keep the quotient finite. Scores that are NaN are no hidden ones: the output is NaN.
        unseen = sums.maximum <= HIDDEN
        total = jnp.where(unseen, 1.0, sums.total)
        out = jnp.where(unseen[..., None], mean, sums._replace(total=total).mean())
        return carry, (out.astype(q.dtype), sums.maximum, total)

    _, (out, maximum, total) = _over_queries(of_queries, q.shape[3] // shape.q_block, None)
    return out, (q, kvs, biases, inputs, out, maximum, total)


def _backward(setting: _Setting, residuals: Any, d_out: Array) -> tuple[Any, ...]:
    q, kvs, biases, inputs, out, maximum, total = residuals
    shape = setting.shape
    rows, groups, repeats = q.shape[:3]
    unseen = maximum <= HIDDEN
    # With 0 as largest score the weights of hidden keys are 0; the gradient of the mean of all values is added below.
    statistics = (jnp.where(unseen, 0.0, maximum), total, correction(out, d_out))
    # In float32, so that the gradient of the table is added up in float32.
    tables = tuple(None if bias is None else bias.table.astype(jnp.float32) for bias in biases)

    def of_queries(index: Array | int, carry: Any) -> tuple[Any, Array]:
        block = _Block(setting, inputs, index, rows, groups * repeats)
        queries, d_outs = slice_block(q, index, shape.q_block), slice_block(d_out, index, shape.q_block)
        here: Any = tuple(slice_block(x[..., None], index, shape.q_block)[..., 0] for x in statistics)
        d_kvs, d_tables = carry
        d_kvs, d_tables = list(d_kvs), list(d_tables)
        d_q = jnp.zeros(queries.shape, jnp.float32)
        for number in range(len(kvs)):

            def add(j: Any, sums: Any, number: int = number) -> Any:
                d_q, (d_k, d_v), d_table = sums
                k, v = (slice_block(x, j, shape.kv_blocks[number]) for x in kvs[number])
                bias, table_gradient = jax.vjp(
                    lambda table: block.bias(number, _with_table(biases[number], table), j), tables[number]
                )
                visible = block.visible(number, j)
                scores = block_scores(queries, k, softcap=setting.softcap, bias=bias, visible=visible)
                keep = block.keep(number, j, scores.values)
                gradients = block_gradients(
                    *(queries, k, v, d_outs, scores, here),
                    visible=visible,
                    keep=keep,
                    dropout_rate=setting.dropout_rate,
                )
                if bias is not None:
                    d_bias = gradients.scores.reshape(rows, -1, *bias.shape[2:])
                    if bias.shape[0] == 1:
                        d_bias = jnp.sum(d_bias, axis=0, keepdims=True)
                    d_table = d_table + table_gradient(d_bias)[0]
                return (
                    d_q + gradients.q,
                    (add_to_block(d_k, gradients.k, j), add_to_block(d_v, gradients.v, j)),
                    d_table,
                )

            sums = (d_q, d_kvs[number], d_tables[number])
            d_q, d_kvs[number], d_tables[number] = loop_over_blocks(*block.kv_range(number), add, sums)
        return (tuple(d_kvs), tuple(d_tables)), d_q.astype(q.dtype)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (tuple(kvs), tables))
    (d_kvs, d_tables), d_q = _over_queries(of_queries, q.shape[3] // shape.q_block, zeros)
    d_mean = jnp.sum(jnp.where(unseen[..., None], d_out.astype(jnp.float32), 0.0), axis=(2, 3)) / sum(shape.kv_lengths)
    d_kvs = tuple(
        (d_k.astype(k.dtype), (d_v + d_mean[:, :, None]).astype(v.dtype))
        for (d_k, d_v), (k, v) in zip(d_kvs, kvs, strict=True)
    )
    d_biases = tuple(
        _with_table(bias, None if bias is None else d_table.astype(bias.table.dtype))
        for bias, d_table in zip(biases, d_tables, strict=True)
    )
    return d_q, d_kvs, d_biases, None


_attend.defvjp(_forward, _backward)


def _with_table(bias: RelativeBias | None, table: Array | None) -> RelativeBias | None:
    return None if bias is None or table is None else dataclasses.replace(bias, table=table)


def _over_queries(of_queries: Callable[[Any, Any], Any], count: int, carry: Any) -> tuple[Any, Any]:
    """Run `of_queries` for each block; return the carry, and its results [B, G, R, q, ...] joined along the queries."""
    if count == 1:
        return of_queries(0, carry)
    carry, blocks = jax.lax.scan(lambda carry, index: of_queries(index, carry), carry, jnp.arange(count))

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 3)
        return x.reshape(*x.shape[:3], -1, *x.shape[5:])

    return carry, jax.tree.map(join, blocks)
