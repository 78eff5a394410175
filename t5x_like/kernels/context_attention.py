"""Attention over a sequence that is split over devices: a ring (Liu et al. 2023, Ring Attention with Blockwise
Transformers), or a gathering of the keys.

Each device has a block of the queries and a block of the keys. In a ring there are as many rounds as devices. In each
round a device attends to the block of keys that it holds and sends the block to its neighbor, so that it holds no more
keys than its current block and the next one. With "all_gather" each device gathers all keys and values once. The
backward pass passes or gathers the keys once more and computes the scores again. Gradients of keys and values travel
with their block around the ring, or are summed and scattered.

Under a causal mask the queries follow the zigzag order (`kernels.ring_layout`), in which every device has the same
work. The softmax is computed online (`kernels.online_softmax`). A `ChunkAttention` computes a chunk of queries with a
chunk of keys.

Shape letters in lower case are sizes on one device: b rows, q queries, k keys, h query heads, g key heads, r query
heads per key head, x head width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from t5x_like.kernels.attention_backend import AttentionOptions
from t5x_like.kernels.attention_masks import BlockwiseMask, KeySpec, SequenceSharding
from t5x_like.kernels.context_device import (
    Arrays,
    ChunkAttention,
    ContextSetting,
    DeviceBlock,
    KeySettings,
    if_needed,
    mesh_size,
)
from t5x_like.kernels.online_softmax import Sums, correction
from t5x_like.kernels.ring_layout import Layout


def context_attention(
    q_BxQxHxh: Array,
    keys_values: Sequence[tuple[Array, Array]],
    mask: BlockwiseMask,
    chunks: ChunkAttention,
    options: AttentionOptions,
) -> Array:
    """Return softmax(q k + bias) v over the visible keys of all sequences together; see `attention`.

    A query without any visible key gets finite numbers, which must be ignored.

    Args:
      q_BxQxHxh: Scaled queries.
      keys_values: Keys and values of each sequence of keys, [B, K, G, h] each. Q and every K are multiples of the
        number of devices over which the sequence is split.
      mask: Description of the mask with `split`.
      chunks: Attention of a chunk of queries with a chunk of keys.
      options: Soft cap and dropout.

    Returns:
      [B, Q, H, h] in the type of q.

    Raises:
      ValueError: the mask has explicit positions.
    """
    assert mask.split is not None
    if any(keys.mask.q_positions is not None or keys.mask.kv_positions is not None for keys in mask.keys):
        raise ValueError("found explicit positions in a sequence that is split over devices, expected positions=None")
    devices = mesh_size(mask.split, mask.split.length)
    q_length, *kv_lengths = (x.shape[1] // devices for x in (q_BxQxHxh, *(k for k, _ in keys_values)))
    # The first sequence of keys is that of the queries if its mask is causal. Others stay contiguous.
    is_zigzag = mask.keys[0].mask.causal and q_length == kv_lengths[0] and q_length % 2 == 0
    if mask.split.form == "ring":
        layouts = [Layout(devices, length, is_zigzag and number == 0) for number, length in enumerate(kv_lengths)]
    else:
        layouts = [Layout(1, devices * length, False) for length in kv_lengths]
    setting = ContextSetting(
        mask.split,
        chunks,
        Layout(devices, q_length, is_zigzag),
        tuple(_key_settings(keys, layout) for keys, layout in zip(mask.keys, layouts, strict=True)),
        options.softcap,
        0.0 if options.dropout_rng is None else options.dropout_rate,
        options.dropout_broadcast_length,
    )
    tables = {
        f"table_{i}": keys.relative_bias.table for i, keys in enumerate(mask.keys) if keys.relative_bias is not None
    }
    mask_arrays = {name: x for i, keys in enumerate(mask.keys) for name, x in _mask_arrays(i, keys).items()}
    if options.dropout_rng is not None:
        mask_arrays["rng"] = options.dropout_rng
    kvs = {f"{name}_{i}": x for i, pair in enumerate(keys_values) for name, x in zip("kv", pair, strict=True)}
    return _attend(setting, q_BxQxHxh, kvs, tables, mask_arrays)


def _key_settings(keys: KeySpec, layout: Layout) -> KeySettings:
    bias = keys.relative_bias
    return KeySettings(
        keys.mask.causal,
        keys.mask.window,
        bias is not None and bias.bidirectional,
        0 if bias is None else bias.max_distance,
        layout,
    )


def _mask_arrays(number: int, keys: KeySpec) -> dict[str, Array]:
    """Return the arrays of a description that are present."""
    names = ("q_segment_ids", "kv_segment_ids", "q_prefix", "kv_prefix")
    arrays = {f"{name}_{number}": getattr(keys.mask, name) for name in names}
    arrays[f"dynamic_window_{number}"] = keys.dynamic_window
    return {name: x for name, x in arrays.items() if x is not None}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(setting: ContextSetting, q: Array, kvs: Arrays, tables: Arrays, mask_arrays: Arrays) -> Array:
    return _forward(setting, q, kvs, tables, mask_arrays)[0]


def _forward(setting: ContextSetting, q: Array, kvs: Arrays, tables: Arrays, mask_arrays: Arrays) -> tuple[Array, Any]:
    specs = _Specs(setting.split)
    out, maximum, total = jax.shard_map(
        functools.partial(_forward_on_device, setting),
        mesh=setting.split.mesh,
        in_specs=(specs.q, specs.all(kvs), specs.all(tables), specs.all(mask_arrays)),
        out_specs=(specs.q, specs.statistic, specs.statistic),
        check_vma=False,
    )(q, kvs, tables, mask_arrays)
    return out, (q, kvs, tables, mask_arrays, out, maximum, total)


def _backward(setting: ContextSetting, residuals: Any, d_out: Array) -> tuple[Any, ...]:
    q, kvs, tables, mask_arrays, out, maximum, total = residuals
    delta = jnp.moveaxis(correction(out, d_out), 1, 2)
    specs = _Specs(setting.split)
    d_q, d_kvs, d_tables = jax.shard_map(
        functools.partial(_backward_on_device, setting),
        mesh=setting.split.mesh,
        in_specs=(
            specs.q,
            specs.all(kvs),
            specs.all(tables),
            specs.all(mask_arrays),
            specs.q,
            *(specs.statistic,) * 3,
        ),
        out_specs=(specs.q, specs.all(kvs), specs.all(tables)),
        check_vma=False,
    )(q, kvs, tables, mask_arrays, d_out, maximum, total, delta)
    return d_q, d_kvs, d_tables, {name: np.zeros(x.shape, jax.dtypes.float0) for name, x in mask_arrays.items()}


_attend.defvjp(_forward, _backward)


class _Specs:
    """Partition specs of the arrays."""

    def __init__(self, split: SequenceSharding):
        batch, length, heads, kv_heads = (
            axes or None for axes in (split.batch, split.length, split.heads, split.kv_heads)
        )
        self.q = PartitionSpec(batch, length, heads)
        self.statistic = PartitionSpec(batch, heads, length)
        self._by_name = {
            "k": PartitionSpec(batch, length, kv_heads),
            "v": PartitionSpec(batch, length, kv_heads),
            "table": PartitionSpec(None, heads),
            # One number per query and key, replicated: gathering it once is less traffic than sending it in each round.
            "q_segment_ids": PartitionSpec(batch),
            "q_prefix": PartitionSpec(batch),
            "kv_segment_ids": PartitionSpec(batch),
            "kv_prefix": PartitionSpec(batch),
            "dynamic_window": PartitionSpec(),
            "rng": PartitionSpec(),
        }

    def all(self, arrays: Arrays) -> dict[str, PartitionSpec]:
        """Return the spec of each array; the number of the sequence at the end of a name does not matter."""
        return {name: self._by_name[name.removesuffix(f"_{name.rpartition('_')[2]}") or name] for name in arrays}


def _heads_first(x: Array, kv_heads: int) -> Array:
    """Return queries or their cotangents [b, q, h, x] as [b, g, r, q, x]."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], kv_heads, -1, x.shape[3]), 1, 3)


def _length_first(x: Array) -> Array:
    """Return queries or outputs [b, g, r, q, x] as [b, q, h, x]."""
    return jnp.moveaxis(x, 3, 1).reshape(x.shape[0], x.shape[3], -1, x.shape[4])


def _forward_on_device(
    setting: ContextSetting, q: Array, kvs: Arrays, tables: Arrays, mask_arrays: Arrays
) -> tuple[Array, Array, Array]:
    """Return the output of this device's queries [b, q, h, x], and the largest score and the sum of exponentials of
    each query and head, [b, h, q], which the backward pass reads in the order of the layout."""
    here, axes = DeviceBlock(setting, q, tables, mask_arrays), setting.split.length
    kvs = here.own_kvs(here.arranged(kvs))
    queries = _heads_first(setting.layout.from_contiguous(q, 1, axes), kvs["k_0"].shape[2])
    queries = setting.layout.stack(queries, axis=3)
    sums = Sums.zeros_like(queries)
    for number in range(len(setting.keys)):

        def attend(kv: Any, source: Array | int, sums: Sums, number: int = number) -> Sums:
            q_starts, kv_starts = here.starts(number, source)

            def of_queries(carry: None, chunk: Any) -> tuple[None, Sums]:
                q, sums, q_start = chunk

                def of_keys(sums: Sums, chunk: Any) -> tuple[Sums, None]:
                    k, v, kv_start, j = chunk
                    pair = here.pair(number, q_start, kv_start)

                    def compute(sums: Sums) -> Sums:
                        return setting.chunks.add(here, pair, sums, q, k, v)

                    return if_needed(here.is_needed(pair), here.is_first(number, source, j), compute, sums), None

                return carry, jax.lax.scan(of_keys, sums, (*kv, kv_starts, jnp.arange(len(kv_starts))))[0]

            # Scans, so that the program has one `ChunkAttention` and not one per pair.
            return jax.lax.scan(of_queries, None, (queries, sums, q_starts))[1]

        sums = here.over_all_keys((kvs[f"k_{number}"], kvs[f"v_{number}"]), attend, sums)
    out = _length_first(setting.layout.join(sums.mean(), axis=3)).astype(q.dtype)
    maximum, total = (
        setting.layout.join(x, axis=3).reshape(here.rows, here.heads, -1) for x in (sums.maximum, sums.total)
    )
    return setting.layout.to_contiguous(out, 1, axes), maximum, total


def _backward_on_device(
    setting: ContextSetting,
    q: Array,
    kvs: Arrays,
    tables: Arrays,
    mask_arrays: Arrays,
    d_out: Array,
    maximum: Array,
    total: Array,
    delta: Array,
) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    """Return the gradients of this device's queries, its keys and values by name, and the tables of relative bias."""
    here, split = DeviceBlock(setting, q, tables, mask_arrays), setting.split
    arranged = here.arranged(kvs)
    # The transpose of `own_kvs` adds the gradients of a key head that several query heads read, in float32.
    own, return_heads = jax.vjp(here.own_kvs, {name: x.astype(jnp.float32) for name, x in arranged.items()})
    arranged_q = setting.layout.from_contiguous(q, 1, split.length)
    arranged_d_out = setting.layout.from_contiguous(d_out, 1, split.length)
    by_chunk = [_heads_first(x, own["k_0"].shape[2]) for x in (arranged_q, arranged_d_out)]
    delta = setting.layout.from_contiguous(delta, 2, split.length)
    by_chunk += [x.reshape(by_chunk[0].shape[:-1]) for x in (maximum, total, delta)]
    queries = tuple(setting.layout.stack(x, axis=3) for x in by_chunk)
    d_q = jnp.zeros(queries[0].shape, jnp.float32)
    d_own: dict[str, Array] = {}
    d_tables: dict[str, Array] = {}
    for number in range(len(setting.keys)):
        names = [f"{name}_{number}" for name in "kv"]
        kv = tuple(own[name].astype(q.dtype) for name in names)

        def attend(kv: Any, d_kv: Any, source: Array | int, state: Any, number: int = number) -> tuple[Any, Any]:
            q_starts, kv_starts = here.starts(number, source)

            def of_queries(carry: Any, chunk: Any) -> tuple[Any, Array]:
                (q, d_out, *statistics), d_q, q_start = chunk
                d_kv, d_table = carry

                def of_keys(carry: Any, chunk: Any) -> tuple[Any, Any]:
                    k, v, d_k, d_v, kv_start, j = chunk
                    pair = here.pair(number, q_start, kv_start)

                    def compute(sums: Any) -> Any:
                        d_k, d_v, (d_q, d_table) = sums
                        added = setting.chunks.gradients(here, pair, q, k, v, d_out, tuple(statistics))
                        if added.table is not None:
                            d_table = d_table + added.table
                        return d_k + added.k, d_v + added.v, (d_q + added.q, d_table)

                    is_first = here.is_first(number, source, j)
                    d_k, d_v, carry = if_needed(here.is_needed(pair), is_first, compute, (d_k, d_v, carry))
                    return carry, (d_k, d_v)

                chunks = (*kv, *d_kv, kv_starts, jnp.arange(len(kv_starts)))
                (d_q, d_table), d_kv = jax.lax.scan(of_keys, (d_q, d_table), chunks)
                return (d_kv, d_table), d_q

            d_q, d_table = state
            (d_kv, d_table), d_q = jax.lax.scan(of_queries, (d_kv, d_table), (queries, d_q, q_starts))
            return d_kv, (d_q, d_table)

        table = tables.get(f"table_{number}")
        d_table = None if table is None else jnp.zeros(table.shape, jnp.float32)
        d_kv, (d_q, d_table) = here.gradients_over_all_keys(kv, attend, (d_q, d_table))
        d_own.update(zip(names, d_kv, strict=True))
        if table is not None:
            # Every device has seen some queries only; heads are split and not summed.
            d_tables[f"table_{number}"] = jax.lax.psum(d_table, (*split.batch, *split.length)).astype(table.dtype)
    # Devices that share key heads but not query heads each have a part of the key heads' gradient.
    others = tuple(axis for axis in split.heads if axis not in split.kv_heads)
    (d_kvs,) = return_heads(d_own)
    d_kvs = {name: (jax.lax.psum(x, others) if others else x).astype(kvs[name].dtype) for name, x in d_kvs.items()}
    d_queries = _length_first(setting.layout.join(d_q, axis=3)).astype(q.dtype)
    return setting.layout.to_contiguous(d_queries, 1, split.length), here.contiguous(d_kvs), d_tables
