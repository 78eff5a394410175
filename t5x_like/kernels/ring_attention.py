"""Ring attention for sequences that are split over devices: keys and values circulate, queries stay (Liu et al. 2023,
Ring Attention with Blockwise Transformers).

Each device has a block of the queries and a block of the keys. There are as many rounds as devices. In each round a
device attends to the block of keys that it holds and sends the block to its neighbor. The softmax is computed online
(`kernels.online_softmax`). A device never holds more scores than those of one block of queries with one block of keys,
and no more keys than its current block and the next one. The backward pass circulates the keys once more and computes
the scores again; gradients of keys and values travel with their block and are back on its device after the last round.

Shape letters in lower case are sizes on one device: b rows, q queries, k keys, h query heads, g key heads, r query
heads per key head, x head width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from t5x_like.kernels.attention_masks import BlockwiseMask, KeySpec, MaskSpec, SequenceSharding, dense_mask
from t5x_like.kernels.dropout import keep_mask_block
from t5x_like.kernels.online_softmax import Scores, Sums, add_block, block_gradients, block_scores, correction
from t5x_like.kernels.position_bias import RelativeBias, dense_bias

Arrays = Mapping[str, Array]
"""Arrays by name and number of their sequence of keys, such as "k_0" or "kv_segment_ids_1"."""


@dataclasses.dataclass(frozen=True)
class _KeySettings:
    """Static part of the description of one sequence of keys."""

    causal: bool
    window: tuple[int, int] | None
    bidirectional: bool
    max_distance: int


@dataclasses.dataclass(frozen=True)
class _Setting:
    """Static part of a call; hashable, so that `custom_vjp` takes it as an argument that is not differentiated.

    Attributes:
      keys: Settings of each sequence of keys.
      shared_dropout: One dropout mask for all queries.
    """

    split: SequenceSharding
    keys: tuple[_KeySettings, ...]
    softcap: float | None
    dropout_rate: float
    shared_dropout: bool


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
    setting = _Setting(
        mask.split,
        tuple(_key_settings(keys) for keys in mask.keys),
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


def _key_settings(keys: KeySpec) -> _KeySettings:
    bias = keys.relative_bias
    return _KeySettings(
        keys.mask.causal,
        keys.mask.window,
        bias is not None and bias.bidirectional,
        0 if bias is None else bias.max_distance,
    )


def _mask_arrays(number: int, keys: KeySpec) -> dict[str, Array]:
    """Return the arrays of a description that are present."""
    names = ("q_segment_ids", "kv_segment_ids", "q_prefix", "kv_prefix")
    arrays = {f"{name}_{number}": getattr(keys.mask, name) for name in names}
    arrays[f"dynamic_window_{number}"] = keys.dynamic_window
    return {name: x for name, x in arrays.items() if x is not None}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(setting: _Setting, q: Array, kvs: Arrays, tables: Arrays, mask_arrays: Arrays) -> Array:
    return _forward(setting, q, kvs, tables, mask_arrays)[0]


def _forward(setting: _Setting, q: Array, kvs: Arrays, tables: Arrays, mask_arrays: Arrays) -> tuple[Array, Any]:
    specs = _Specs(setting.split)
    out, maximum, total = jax.shard_map(
        functools.partial(_forward_on_device, setting),
        mesh=setting.split.mesh,
        in_specs=(specs.q, specs.all(kvs), specs.all(tables), specs.all(mask_arrays)),
        out_specs=(specs.q, specs.statistic, specs.statistic),
        check_vma=False,
    )(q, kvs, tables, mask_arrays)
    return out, (q, kvs, tables, mask_arrays, out, maximum, total)


def _backward(setting: _Setting, residuals: Any, d_out: Array) -> tuple[Any, ...]:
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
            "q_segment_ids": PartitionSpec(batch, length),
            "q_prefix": PartitionSpec(batch, length),
            # One number per key, replicated: gathering it once is less traffic than sending it in every round.
            "kv_segment_ids": PartitionSpec(batch),
            "kv_prefix": PartitionSpec(batch),
            "dynamic_window": PartitionSpec(),
            "rng": PartitionSpec(),
        }

    def all(self, arrays: Arrays) -> dict[str, PartitionSpec]:
        """Return the spec of each array; the number of the sequence at the end of a name does not matter."""
        return {name: self._by_name[name.removesuffix(f"_{name.rpartition('_')[2]}") or name] for name in arrays}


class _DeviceBlock:
    """Computations of one device inside `shard_map`: scores, masks and dropout of its queries with one block of keys.

    Queries are [b, g, r, q, x] and keys [b, g, k, x]. `source` is the rank of the device whose block of keys is held.
    """

    def __init__(self, setting: _Setting, q: Array, tables: Arrays, mask_arrays: Arrays):
        self.setting, self.tables, self.mask_arrays = setting, tables, mask_arrays
        self.size = _size(setting.split, setting.split.length)
        # Blocks are numbered along the length over these axes with the outermost first, as `PartitionSpec` splits it.
        self.rank = jax.lax.axis_index(setting.split.length)
        self.rows, self.q_length, self.heads, self.width = q.shape

    def scores(self, number: int, q: Array, k: Array, source: Array, visible: Array | None) -> Scores:
        """Return the scores [b, g, r, q, k] under the mask `visible`."""
        table = self.tables.get(f"table_{number}")
        bias = None if table is None else self.bias(table, self.setting.keys[number], k.shape[2], source)
        return block_scores(q, k, softcap=self.setting.softcap, bias=bias, visible=visible)

    def bias(self, table: Array, settings: _KeySettings, kv_length: int, source: Array) -> Array:
        """Return T5's bias of these queries and keys, [1, h, q, k]."""
        # Index of the first key minus that of the first query, in the whole sequence; the bias needs differences only.
        offset = source * kv_length - self.rank * self.q_length
        relative_bias = RelativeBias(table, settings.bidirectional, settings.max_distance)
        return dense_bias(relative_bias, self.q_length, kv_length, offset=offset)

    def visible(self, number: int, kv_length: int, source: Array) -> Array | None:
        """Return the mask, bool [1 or b, 1, 1, 1 or q, k], or None if every key is visible."""
        settings = self.setting.keys[number]

        def block(name: str) -> Array | None:
            # Arrays of keys are whole on every device: take the part of the block that is held.
            x = self.mask_arrays.get(f"{name}_{number}")
            if x is None or not name.startswith("kv"):
                return x
            return jax.lax.dynamic_slice_in_dim(x, source * kv_length, kv_length, axis=1)

        dynamic = self.mask_arrays.get(f"dynamic_window_{number}")
        window: Any = settings.window if dynamic is None else (dynamic[0], dynamic[1])
        mask = MaskSpec(
            causal=settings.causal,
            window=window,
            q_positions=(self.rank * self.q_length + jnp.arange(self.q_length))[None],
            kv_positions=(source * kv_length + jnp.arange(kv_length))[None],
            q_segment_ids=block("q_segment_ids"),
            kv_segment_ids=block("kv_segment_ids"),
            q_prefix=block("q_prefix"),
            kv_prefix=block("kv_prefix"),
        )
        dense = dense_mask(mask, self.q_length, kv_length)
        return None if dense is None else dense[:, :, None]

    def keep(self, number: int, shape: Sequence[int], kv_lengths: Sequence[int], source: Array) -> Array | None:
        """Return the part of the dropout mask over all rows, heads, queries and keys that belongs to scores of `shape`.

        The whole mask does not depend on how the sequence is split. None without dropout.
        """
        if self.setting.dropout_rate == 0.0:
            return None
        split = self.setting.split
        rows, heads, q_length = (
            count * _size(split, axes)
            for count, axes in (
                (self.rows, split.batch),
                (self.heads, split.heads),
                (self.q_length, split.length),
            )
        )
        # Keys of several sequences are numbered one after the other, in the whole mask as in `attention`.
        before = self.size * sum(kv_lengths[:number])
        shared = self.setting.shared_dropout
        keep = keep_mask_block(
            self.mask_arrays["rng"],
            1.0 - self.setting.dropout_rate,
            (rows, heads, 1 if shared else q_length, self.size * sum(kv_lengths)),
            (
                _rank(split.batch) * self.rows,
                _rank(split.heads) * self.heads,
                0 if shared else self.rank * self.q_length,
                before + source * kv_lengths[number],
            ),
            (self.rows, self.heads, 1 if shared else self.q_length, kv_lengths[number]),
        )
        return keep.reshape(*shape[:3], *keep.shape[2:])

    def own_heads(self, kv: Array, kv_heads: int) -> Array:
        """Return the heads of keys or values [b, k, G, x] that this device's queries read.

        There are `kv_heads` key heads on all devices together. Where query heads are split over more devices than key
        heads, several devices read the same key head.
        """
        split = self.setting.split
        if split.heads == split.kv_heads:
            return kv
        # Query head i of all devices reads key head i // repeats of all devices; both are shifted to this device's own.
        repeats = self.heads * _size(split, split.heads) // kv_heads
        first = _rank(split.heads) * self.heads
        before = _rank(split.kv_heads) * kv.shape[2]
        if repeats % self.heads == 0:
            return jax.lax.dynamic_slice_in_dim(kv, first // repeats - before, 1, axis=2)
        return jnp.take(kv, (first + jnp.arange(self.heads)) // repeats - before, axis=2)

    def own_kvs(self, kvs: Arrays) -> dict[str, Array]:
        """Return keys and values with the heads that this device's queries read, [b, g, k, x] each."""
        kv_heads = kvs["k_0"].shape[2] * _size(self.setting.split, self.setting.split.kv_heads)
        return {name: jnp.swapaxes(self.own_heads(x, kv_heads), 1, 2) for name, x in kvs.items()}

    def source_of(self, step: Array) -> Array:
        """Return the rank of the device whose block of keys is held in round `step`."""
        return (self.rank - step) % self.size

    def send_to_neighbor(self, tree: Any) -> Any:
        """Send arrays to the next device of the ring and return those of the previous one."""
        ring = [(i, (i + 1) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.setting.split.length, ring), tree)


def _size(split: SequenceSharding, axes: tuple[str, ...]) -> int:
    return math.prod(split.mesh.shape[axis] for axis in axes)


def _rank(axes: tuple[str, ...]) -> Array | int:
    return jax.lax.axis_index(axes) if axes else 0


def _kv_lengths(kvs: Arrays) -> list[int]:
    return [kvs[f"k_{number}"].shape[1] for number in range(len(kvs) // 2)]


def _heads_first(x: Array, kv_heads: int) -> Array:
    """Return queries or their cotangents [b, q, h, x] as [b, g, r, q, x]."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], kv_heads, -1, x.shape[3]), 1, 3)


def _length_first(x: Array) -> Array:
    """Return queries or outputs [b, g, r, q, x] as [b, q, h, x]."""
    return jnp.moveaxis(x, 3, 1).reshape(x.shape[0], x.shape[3], -1, x.shape[4])


def _if_any(visible: Array | None, is_first: Array, compute: Any, carry: Any) -> Any:
    """Return `compute(carry)`, or `carry` for a block without any visible key.

    The first block is always computed, so that every query has at least one score and `total` is not 0.
    """
    if visible is None:
        return compute(carry)
    # `compute` has no collective operation, so that devices may decide differently.
    return jax.lax.cond(is_first | jnp.any(visible), compute, lambda carry: carry, carry)


def _forward_on_device(
    setting: _Setting, q: Array, kvs: Arrays, tables: Arrays, mask_arrays: Arrays
) -> tuple[Array, Array, Array]:
    """Return the output of this device's queries [b, q, h, x], and the largest score and the sum of exponentials of
    each query and head, [b, h, q], which the backward pass reads."""
    here = _DeviceBlock(setting, q, tables, mask_arrays)
    lengths = _kv_lengths(kvs)
    kvs = here.own_kvs(kvs)
    queries = _heads_first(q, kvs["k_0"].shape[1])
    sums = Sums.zeros_like(queries)
    for number in range(len(lengths)):

        def attend(kv: Any, step: Array, sums: Sums, number: int = number) -> Any:
            k, v = kv
            source = here.source_of(step)
            visible = here.visible(number, k.shape[2], source)

            def compute(sums: Sums) -> Sums:
                scores = here.scores(number, queries, k, source, visible)
                keep = here.keep(number, scores.values.shape, lengths, source)
                return add_block(sums, scores, v, keep=keep, dropout_rate=setting.dropout_rate)

            return _if_any(visible, (step == 0) & (number == 0), compute, sums)

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
    by_head = (here.rows, here.heads, here.q_length)
    return _length_first(sums.mean()).astype(q.dtype), sums.maximum.reshape(by_head), sums.total.reshape(by_head)


def _backward_on_device(
    setting: _Setting,
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
    here = _DeviceBlock(setting, q, tables, mask_arrays)
    lengths = _kv_lengths(kvs)
    split = setting.split
    # The transpose of `own_kvs` adds the gradients of a key head that several query heads read, in float32.
    own, return_heads = jax.vjp(here.own_kvs, {name: x.astype(jnp.float32) for name, x in kvs.items()})
    queries, d_outs = (_heads_first(x, own["k_0"].shape[1]) for x in (q, d_out))
    statistics: Any = tuple(x.reshape(queries.shape[:4]) for x in (maximum, total, delta))
    d_q = jnp.zeros(queries.shape, jnp.float32)
    d_own: dict[str, Array] = {}
    d_tables: dict[str, Array] = {}
    for number in range(len(lengths)):
        names = [f"{name}_{number}" for name in "kv"]
        kv = tuple(own[name].astype(q.dtype) for name in names)
        table = tables.get(f"table_{number}")

        def ring_step(state: Any, step: Array, number: int = number, table: Array | None = table) -> tuple[Any, None]:
            (k, v), d_kv, carry = state
            source = here.source_of(step)
            visible = here.visible(number, k.shape[2], source)
            following = here.send_to_neighbor((k, v))

            def compute(sums: Any) -> Any:
                (d_k, d_v), (d_q, d_table) = sums
                scores = here.scores(number, queries, k, source, visible)
                keep = here.keep(number, scores.values.shape, lengths, source)
                gradients = block_gradients(
                    *(queries, k, v, d_outs, scores, statistics),
                    visible=visible,
                    keep=keep,
                    dropout_rate=setting.dropout_rate,
                )
                if table is not None:
                    settings = setting.keys[number]
                    _, bias_vjp = jax.vjp(lambda table: here.bias(table, settings, k.shape[2], source), table)
                    d_bias = jnp.sum(gradients.scores, axis=0).reshape(1, -1, *scores.values.shape[3:])
                    d_table = d_table + bias_vjp(d_bias.astype(table.dtype))[0]
                return (d_k + gradients.k, d_v + gradients.v), (d_q + gradients.q, d_table)

            d_kv, carry = _if_any(visible, (step == 0) & (number == 0), compute, (d_kv, carry))
            return (following, here.send_to_neighbor(d_kv), carry), None

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
    return _length_first(d_q).astype(q.dtype), d_kvs, d_tables
