"""Ring attention for sequences that are split over devices: keys and values circulate, queries stay (Liu et al. 2023,
Ring Attention with Blockwise Transformers).

Each device has a block of the queries and a block of the keys. There are as many rounds as devices. In each round a
device attends to the block of keys that it holds and sends the block to its neighbor. Under a causal mask the blocks
follow the zigzag order (`kernels.ring_layout`), in which every device has the same work. The softmax is computed
online (`kernels.online_softmax`). A device never holds more scores than those of one block of queries with one block of
keys, and no more keys than its current block and the next one. The backward pass circulates the keys once more and
computes the scores again; gradients of keys and values travel with their block and are back on its device after the
last round.

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

from t5x_like.kernels.attention_masks import BlockwiseMask, KeySpec, SequenceSharding
from t5x_like.kernels.online_softmax import Sums, add_block, block_gradients, correction
from t5x_like.kernels.ring_block import Arrays, DeviceBlock, KeySettings, RingSetting, mesh_size
from t5x_like.kernels.ring_layout import Layout


def ring_attention(
    q_BxQxHxh: Array,
    keys_values: Sequence[tuple[Array, Array]],
    mask: BlockwiseMask,
    *,
    softcap: float | None,
    dropout_rate: float,
    dropout_rng: Array | None,
    dropout_broadcast_length: bool,
) -> Array:
    """Return softmax(q k + bias) v over the visible keys of all sequences together; see `attention`.

    A query without any visible key gets a mean of values, which must be ignored.

    Args:
      q_BxQxHxh: Scaled queries.
      keys_values: Keys and values of each sequence of keys, [B, K, G, h] each. Q and every K are multiples of the
        number of devices over which the sequence is split.
      mask: Description of the mask with `split`.
      softcap: Scores s become softcap * tanh(s / softcap) before bias and mask; None: no soft cap.
      dropout_rate: Rate at which probabilities are dropped.
      dropout_rng: Key of the dropout mask; None: no dropout.
      dropout_broadcast_length: One dropout mask for all queries.

    Returns:
      [B, Q, H, h] in the type of q.

    Raises:
      ValueError: the mask has explicit positions.
    """
    assert mask.split is not None
    if any(keys.mask.q_positions is not None or keys.mask.kv_positions is not None for keys in mask.keys):
        raise ValueError("found explicit positions in a sequence that is split over devices, expected positions=None")
    devices = mesh_size(mask.split, mask.split.length)
    lengths = [q_BxQxHxh.shape[1] // devices, *(k.shape[1] // devices for k, _ in keys_values)]
    # The first sequence of keys is that of the queries if its mask is causal. Others stay contiguous.
    is_zigzag = mask.keys[0].mask.causal and lengths[0] == lengths[1] and lengths[0] % 2 == 0
    layouts = [Layout(devices, length, is_zigzag and number < 2) for number, length in enumerate(lengths)]
    setting = RingSetting(
        mask.split,
        layouts[0],
        tuple(_key_settings(keys, layout) for keys, layout in zip(mask.keys, layouts[1:], strict=True)),
        softcap,
        0.0 if dropout_rng is None else dropout_rate,
        dropout_broadcast_length,
    )
    tables = {
        f"table_{i}": keys.relative_bias.table for i, keys in enumerate(mask.keys) if keys.relative_bias is not None
    }
    mask_arrays = {name: x for i, keys in enumerate(mask.keys) for name, x in _mask_arrays(i, keys).items()}
    if dropout_rng is not None:
        mask_arrays["rng"] = dropout_rng
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
def _attend(setting: RingSetting, q: Array, kvs: Arrays, tables: Arrays, mask_arrays: Arrays) -> Array:
    return _forward(setting, q, kvs, tables, mask_arrays)[0]


def _forward(setting: RingSetting, q: Array, kvs: Arrays, tables: Arrays, mask_arrays: Arrays) -> tuple[Array, Any]:
    specs = _Specs(setting.split)
    out, maximum, total = jax.shard_map(
        functools.partial(_forward_on_device, setting),
        mesh=setting.split.mesh,
        in_specs=(specs.q, specs.all(kvs), specs.all(tables), specs.all(mask_arrays)),
        out_specs=(specs.q, specs.statistic, specs.statistic),
        check_vma=False,
    )(q, kvs, tables, mask_arrays)
    return out, (q, kvs, tables, mask_arrays, out, maximum, total)


def _backward(setting: RingSetting, residuals: Any, d_out: Array) -> tuple[Any, ...]:
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


def _if_any(visible: Array | None, is_first: Any, compute: Any, carry: Any) -> Any:
    """Return `compute(carry)`, or `carry` for a pair of chunks without any visible key.

    The first pair of each chunk of queries is always computed, so that every query has at least one score and `total`
    is not 0.
    """
    if visible is None:
        return compute(carry)
    # `compute` has no collective operation, so that devices may decide differently.
    return jax.lax.cond(is_first | jnp.any(visible), compute, lambda carry: carry, carry)


def _forward_on_device(
    setting: RingSetting, q: Array, kvs: Arrays, tables: Arrays, mask_arrays: Arrays
) -> tuple[Array, Array, Array]:
    """Return the output of this device's queries [b, q, h, x], and the largest score and the sum of exponentials of
    each query and head, [b, h, q], which the backward pass reads in the order of the layout."""
    here, axes = DeviceBlock(setting, q, tables, mask_arrays), setting.split.length
    kvs = here.own_kvs(here.arranged(kvs))
    queries = setting.layout.split(
        _heads_first(setting.layout.from_contiguous(q, 1, axes), kvs["k_0"].shape[1]), axis=3
    )
    sums = [Sums.zeros_like(chunk) for chunk in queries]
    for number, keys in enumerate(setting.keys):

        def attend(kv: Any, step: Any, sums: list[Sums], number: int = number, keys: Any = keys) -> list[Sums]:
            k_chunks, v_chunks = (keys.layout.split(x, axis=2) for x in kv)
            pairs, new = here.pairs(number, here.source_of(step)), []
            for chunk, of_chunk, chunk_sums in zip(queries, pairs, sums, strict=True):
                for j, (pair, k, v) in enumerate(zip(of_chunk, k_chunks, v_chunks, strict=True)):
                    visible = here.visible(pair)

                    def compute(sums: Sums, chunk: Any = chunk, pair: Any = pair, kv: Any = (k, v, visible)) -> Sums:
                        k, v, visible = kv
                        scores = here.scores(pair, chunk, k, visible)
                        keep = here.keep(pair, scores.values.shape)
                        return add_block(sums, scores, v, keep=keep, dropout_rate=setting.dropout_rate)

                    chunk_sums = _if_any(visible, (step == 0) & (number == 0) & (j == 0), compute, chunk_sums)
                new.append(chunk_sums)
            return new

        def ring_step(state: Any, step: Array, attend: Any = attend) -> tuple[Any, None]:
            kv, sums = state
            # Sent before it is used, so that the transfer runs beside the products.
            following = here.send_to_neighbor(kv)
            return (following, attend(kv, step, sums)), None

        # A scan and not a Python loop: the program does not grow with the number of devices.
        kv = (kvs[f"k_{number}"], kvs[f"v_{number}"])
        (kv, sums), _ = jax.lax.scan(ring_step, (kv, sums), jnp.arange(here.size - 1))
        # The last block is not sent on.
        sums = attend(kv, jnp.int32(here.size - 1), sums)
    out = jnp.concatenate([_length_first(each.mean()) for each in sums], axis=1).astype(q.dtype)
    maximum, total = (
        jnp.concatenate([x.reshape(here.rows, here.heads, -1) for x in xs], axis=2)
        for xs in ([each.maximum for each in sums], [each.total for each in sums])
    )
    return setting.layout.to_contiguous(out, 1, axes), maximum, total


def _backward_on_device(
    setting: RingSetting,
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
    queries, d_outs = (
        setting.layout.split(
            _heads_first(setting.layout.from_contiguous(x, 1, split.length), own["k_0"].shape[1]), axis=3
        )
        for x in (q, d_out)
    )
    by_head = queries[0].shape[:3]
    delta = setting.layout.from_contiguous(delta, 2, split.length)
    statistics: Any = list(
        zip(*(setting.layout.split(x.reshape(*by_head, -1), axis=3) for x in (maximum, total, delta)), strict=True)
    )
    d_q = [jnp.zeros(chunk.shape, jnp.float32) for chunk in queries]
    d_own: dict[str, Array] = {}
    d_tables: dict[str, Array] = {}
    for number, keys in enumerate(setting.keys):
        names = [f"{name}_{number}" for name in "kv"]
        kv = tuple(own[name].astype(q.dtype) for name in names)
        table = tables.get(f"table_{number}")

        def ring_step(
            state: Any, step: Array, number: int = number, keys: Any = keys, table: Array | None = table
        ) -> tuple[Any, None]:
            kv, d_kv, (d_q, d_table) = state
            following = here.send_to_neighbor(kv)
            chunks, d_chunks = (
                [list(pair) for pair in zip(*(keys.layout.split(x, axis=2) for x in each), strict=True)]
                for each in (kv, d_kv)
            )
            pairs, d_q = here.pairs(number, here.source_of(step)), list(d_q)
            for i, of_chunk in enumerate(pairs):
                for j, pair in enumerate(of_chunk):
                    visible = here.visible(pair)

                    def compute(
                        sums: Any, i: int = i, j: int = j, pair: Any = pair, visible: Array | None = visible
                    ) -> Any:
                        d_k, d_v, d_q, d_table = sums
                        k, v = chunks[j]
                        scores = here.scores(pair, queries[i], k, visible)
                        gradients = block_gradients(
                            *(queries[i], k, v, d_outs[i], scores, statistics[i]),
                            visible=visible,
                            keep=here.keep(pair, scores.values.shape),
                            dropout_rate=setting.dropout_rate,
                        )
                        if table is not None:
                            _, bias_vjp = jax.vjp(lambda table: here.bias(table, pair), table)
                            d_bias = jnp.sum(gradients.scores, axis=0).reshape(1, -1, *scores.values.shape[3:])
                            d_table = d_table + bias_vjp(d_bias.astype(table.dtype))[0]
                        return d_k + gradients.k, d_v + gradients.v, d_q + gradients.q, d_table

                    is_first = (step == 0) & (number == 0) & (j == 0)
                    *d_chunks[j], d_q[i], d_table = _if_any(visible, is_first, compute, (*d_chunks[j], d_q[i], d_table))
            d_kv = tuple(jnp.concatenate(parts, axis=2) for parts in zip(*d_chunks, strict=True))
            return (following, here.send_to_neighbor(d_kv), (d_q, d_table)), None

        zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in kv)
        # Here every block is sent on after the last round as well, which returns the gradients to the block's device.
        d_table = None if table is None else jnp.zeros(table.shape, table.dtype)
        (_, d_kv, (d_q, d_table)), _ = jax.lax.scan(ring_step, (kv, zeros, (d_q, d_table)), jnp.arange(here.size))
        d_own.update(zip(names, d_kv, strict=True))
        if d_table is not None:
            # Every device has seen some queries only; heads are split and not summed.
            d_tables[f"table_{number}"] = jax.lax.psum(d_table, (*split.batch, *split.length))
    # Devices that share key heads but not query heads each have a part of the key heads' gradient.
    others = tuple(axis for axis in split.heads if axis not in split.kv_heads)
    (d_kvs,) = return_heads(d_own)
    d_kvs = {name: (jax.lax.psum(x, others) if others else x).astype(kvs[name].dtype) for name, x in d_kvs.items()}
    d_queries = jnp.concatenate([_length_first(each) for each in d_q], axis=1).astype(q.dtype)
    return setting.layout.to_contiguous(d_queries, 1, split.length), here.contiguous(d_kvs), d_tables
