"""One device of an attention over a split sequence: its chunks of queries, and the chunks of keys that it meets.

Shape letters in lower case are sizes on one device: b rows, q queries and k keys of a chunk, h query heads, g key
heads, r query heads per key head, x head width.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from t5x_like.kernels.attention_masks import KeySpec, MaskSpec, SequenceSharding, reaches
from t5x_like.kernels.dropout import keep_mask_block
from t5x_like.kernels.online_softmax import Sums
from t5x_like.kernels.position_bias import RelativeBias
from t5x_like.kernels.ring_layout import Layout

Arrays = Mapping[str, Array]
"""Arrays by name and number of their sequence of keys, such as "k_0" or "kv_segment_ids_1"."""


@dataclasses.dataclass(frozen=True)
class KeySettings:
    """Static part of the description of one sequence of keys."""

    causal: bool
    window: tuple[int, int] | None
    bidirectional: bool
    max_distance: int
    layout: Layout


@dataclasses.dataclass(frozen=True)
class ContextSetting:
    """Static part of a call; hashable, so that `custom_vjp` takes it as an argument that is not differentiated.

    Attributes:
      chunks: Attention of a chunk of queries with a chunk of keys.
      layout: Order of the queries over the devices.
      keys: Settings of each sequence of keys.
      shared_dropout: One dropout mask for all queries.
    """

    split: SequenceSharding
    chunks: ChunkAttention
    layout: Layout
    keys: tuple[KeySettings, ...]
    softcap: float | None
    dropout_rate: float
    shared_dropout: bool


@dataclasses.dataclass(frozen=True)
class Pair:
    """A chunk of this device's queries and a chunk of the keys that it holds.

    Attributes:
      number: Number of the sequence of keys.
      q_start: Index of the first query in the whole sequence.
      kv_start: Index of the first key in its whole sequence.
      q_length: Number of queries.
      kv_length: Number of keys.
    """

    number: int
    q_start: Any
    kv_start: Any
    q_length: int
    kv_length: int


class ChunkGradients(NamedTuple):
    """Contribution of a pair of chunks to the gradients, in float32.

    Attributes:
      q: [b, g, r, q, x].
      k: [b, g, k, x].
      v: [b, g, k, x].
      table: Gradient of the table of T5's bias, [buckets, h], or None without a bias.
    """

    q: Array
    k: Array
    v: Array
    table: Array | None


class ChunkAttention(abc.ABC):
    """Attention of a chunk of queries [b, g, r, q, x] with a chunk of keys and values [b, g, k, x].

    An instance is static and hashable.
    """

    @abc.abstractmethod
    def add(self, here: DeviceBlock, pair: Pair, sums: Sums, q: Array, k: Array, v: Array) -> Sums:
        """Return the sums of the queries with those over these keys."""

    @abc.abstractmethod
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
        """Return what the pair adds to the gradients.

        Args:
          here: The device.
          pair: The pair.
          q: Scaled queries.
          k: Keys.
          v: Values.
          d_out: Cotangent of the output of the queries.
          statistics: Maximum and total of the sums over all keys, and `online_softmax.correction`, [b, g, r, q] each.
        """


class DeviceBlock:
    """One device inside `shard_map`: masks, biases and dropout of its pairs of chunks, and the exchange of keys."""

    def __init__(self, setting: ContextSetting, q: Array, tables: Arrays, mask_arrays: Arrays):
        self.setting, self.tables, self.mask_arrays = setting, tables, mask_arrays
        self.size = setting.layout.devices
        # Blocks are numbered along the length over these axes with the outermost first, as `PartitionSpec` splits it.
        self.rank = jax.lax.axis_index(setting.split.length)
        self.rows, self.heads, self.width = q.shape[0], q.shape[2], q.shape[3]

    def starts(self, number: int, source: Array | int) -> tuple[Array, Array]:
        """Return the index of the first position of each chunk of this device's queries, and of the keys of the device
        of rank `source`, in their whole sequences."""
        own, keys = self.setting.layout.starts(self.rank), self.setting.keys[number].layout.starts(source)
        return jnp.stack([jnp.asarray(x) for x in own]), jnp.stack([jnp.asarray(x) for x in keys])

    def pair(self, number: int, q_start: Array, kv_start: Array) -> Pair:
        """Return the pair of the chunks that begin at these indices."""
        own, keys = self.setting.layout, self.setting.keys[number].layout
        return Pair(number, q_start, kv_start, own.chunk_length, keys.chunk_length)

    def key_spec(self, pair: Pair) -> KeySpec:
        """Return the mask and the bias of a pair of chunks. Its indices count from 0, those of the sequence from the
        starts of the pair."""
        settings, number = self.setting.keys[pair.number], pair.number

        def part(name: str) -> Array | None:
            # These arrays are whole on every device: take the part of the chunk.
            x = self.mask_arrays.get(f"{name}_{number}")
            if x is None:
                return None
            is_q = name.startswith("q")
            start, length = (pair.q_start, pair.q_length) if is_q else (pair.kv_start, pair.kv_length)
            return jax.lax.dynamic_slice_in_dim(x, start, length, axis=1)

        mask = MaskSpec(
            causal=settings.causal,
            window=settings.window,
            q_segment_ids=part("q_segment_ids"),
            kv_segment_ids=part("kv_segment_ids"),
            q_prefix=part("q_prefix"),
            kv_prefix=part("kv_prefix"),
        )
        table = self.tables.get(f"table_{number}")
        bias = None if table is None else RelativeBias(table, settings.bidirectional, settings.max_distance)
        return KeySpec(mask, bias, self.mask_arrays.get(f"dynamic_window_{number}"))

    def is_first(self, number: int, source: Array | int, chunk: Array) -> Array | bool:
        """Return whether a chunk of keys is the first one that each chunk of queries meets."""
        if number:
            return False
        return (chunk == 0) & (self.setting.split.form == "all_gather" or source == self.rank)

    def is_needed(self, pair: Pair) -> Array | None:
        """Return False for a pair that the causal limit, the window or the ranges of the segments hide as a whole.

        None: the description alone cannot hide it.
        """
        keys = self.key_spec(pair)
        mask = keys.mask
        window: Any = mask.window if keys.dynamic_window is None else (keys.dynamic_window[0], keys.dynamic_window[1])
        lengths = pair.q_start, pair.q_length, pair.kv_start, pair.kv_length
        conditions: list[Any] = []
        if window is not None:
            conditions.append(reaches(*lengths, causal=False, window=window))
        if mask.causal:
            below = reaches(*lengths, causal=True, window=None)
            if mask.has_prefix:
                assert mask.q_prefix is not None and mask.kv_prefix is not None
                below = below | (jnp.any(mask.q_prefix, axis=1) & jnp.any(mask.kv_prefix, axis=1))
            conditions.append(below)
        if mask.kv_segment_ids is not None:
            q_ids, kv_ids = mask.q_segment_ids, mask.kv_segment_ids
            if q_ids is None:
                conditions.append(jnp.any(kv_ids != 0, axis=1))
            else:
                conditions.append(jnp.min(q_ids, axis=1) <= jnp.max(kv_ids, axis=1))
                conditions.append(jnp.min(kv_ids, axis=1) <= jnp.max(q_ids, axis=1))
        return jnp.any(functools.reduce(jnp.logical_and, conditions)) if conditions else None

    def keep(self, pair: Pair, shape: Sequence[int]) -> Array | None:
        """Return the part of the dropout mask over all rows, heads, queries and keys that belongs to scores of `shape`.

        The whole mask does not depend on how the sequence is split. None without dropout.
        """
        if self.setting.dropout_rate == 0.0:
            return None
        split = self.setting.split
        rows, heads = (
            count * mesh_size(split, axes) for count, axes in ((self.rows, split.batch), (self.heads, split.heads))
        )
        # Keys of several sequences are numbered one after the other, in the whole mask as in `attention`.
        kv_lengths = [keys.layout.devices * keys.layout.length for keys in self.setting.keys]
        shared = self.setting.shared_dropout
        keep = keep_mask_block(
            self.mask_arrays["rng"],
            1.0 - self.setting.dropout_rate,
            (rows, heads, 1 if shared else self.size * self.setting.layout.length, sum(kv_lengths)),
            (
                mesh_rank(split.batch) * self.rows,
                mesh_rank(split.heads) * self.heads,
                0 if shared else pair.q_start,
                sum(kv_lengths[: pair.number]) + pair.kv_start,
            ),
            (self.rows, self.heads, 1 if shared else pair.q_length, pair.kv_length),
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
        repeats = self.heads * mesh_size(split, split.heads) // kv_heads
        first = mesh_rank(split.heads) * self.heads
        before = mesh_rank(split.kv_heads) * kv.shape[2]
        if repeats % self.heads == 0:
            return jax.lax.dynamic_slice_in_dim(kv, first // repeats - before, 1, axis=2)
        return jnp.take(kv, (first + jnp.arange(self.heads)) // repeats - before, axis=2)

    def own_kvs(self, kvs: Arrays) -> dict[str, Array]:
        """Return chunks of keys and values with the heads that this device's queries read, [chunks, b, g, k, x]."""
        kv_heads = kvs["k_0"].shape[2] * mesh_size(self.setting.split, self.setting.split.kv_heads)
        return {
            name: self._chunks(name).stack(jnp.swapaxes(self.own_heads(x, kv_heads), 1, 2), axis=2)
            for name, x in kvs.items()
        }

    def arranged(self, kvs: Arrays) -> dict[str, Array]:
        """Return keys and values [b, k, g, x] in the layouts of their sequences, from contiguous ones."""
        axes = self.setting.split.length
        return {name: self._layout(name).from_contiguous(x, 1, axes) for name, x in kvs.items()}

    def contiguous(self, kvs: Arrays) -> dict[str, Array]:
        """Return the inverse of `arranged`."""
        axes = self.setting.split.length
        return {name: self._layout(name).to_contiguous(x, 1, axes) for name, x in kvs.items()}

    def _chunks(self, name: str) -> Layout:
        """Return the layout of what this device has of a sequence of keys."""
        layout = self._layout(name)
        if self.setting.split.form == "ring":
            return layout
        return dataclasses.replace(layout, devices=self.size, length=layout.length // self.size)

    def _layout(self, name: str) -> Layout:
        return self.setting.keys[int(name.rpartition("_")[2])].layout

    def over_all_keys(self, kv: Any, attend: Callable[[Any, Array | int, Any], Any], state: Any) -> Any:
        """Return the state after `attend(kv, source, state)` with the keys and values of every device.

        Args:
          kv: Keys and values of this device, [chunks, b, g, k, x] each.
          attend: Function of keys, the rank of the device whose chunks they are, and the state.
          state: State at first.
        """
        if self.setting.split.form == "all_gather":
            return attend(jax.tree.map(self._gather, kv), 0, state)

        def ring_step(carry: Any, step: Array) -> tuple[Any, None]:
            kv, state = carry
            # Sent before it is used, so that the transfer runs beside the products.
            following = self._send_to_neighbor(kv)
            return (following, attend(kv, self._source_of(step), state)), None

        # A scan and not a Python loop: the program does not grow with the number of devices.
        (kv, state), _ = jax.lax.scan(ring_step, (kv, state), jnp.arange(self.size - 1))
        # The last block is not sent on.
        return attend(kv, self._source_of(jnp.int32(self.size - 1)), state)

    def gradients_over_all_keys(
        self, kv: Any, attend: Callable[[Any, Any, Array | int, Any], tuple[Any, Any]], state: Any
    ) -> tuple[Any, Any]:
        """Return the gradients of this device's keys and values in float32, and the state.

        Args:
          kv: Keys and values of this device, [chunks, b, g, k, x] each.
          attend: Function of keys, their gradients so far, the rank of the device whose chunks they are, and the state;
            returns the gradients and the state.
          state: State at first.
        """

        def zeros(kv: Any) -> Any:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), kv)

        if self.setting.split.form == "all_gather":
            kv = jax.tree.map(self._gather, kv)
            d_kv, state = attend(kv, zeros(kv), 0, state)
            return jax.tree.map(self._scatter, d_kv), state

        def ring_step(carry: Any, step: Array) -> tuple[Any, None]:
            kv, d_kv, state = carry
            following = self._send_to_neighbor(kv)
            d_kv, state = attend(kv, d_kv, self._source_of(step), state)
            return (following, self._send_to_neighbor(d_kv), state), None

        # Here every block is sent on after the last round as well, which returns the gradients to the block's device.
        (_, d_kv, state), _ = jax.lax.scan(ring_step, (kv, zeros(kv), state), jnp.arange(self.size))
        return d_kv, state

    def _gather(self, x: Array) -> Array:
        return jax.lax.all_gather(x, self.setting.split.length, axis=3, tiled=True)

    def _scatter(self, x: Array) -> Array:
        return jax.lax.psum_scatter(x, self.setting.split.length, scatter_dimension=3, tiled=True)

    def _source_of(self, step: Array) -> Array:
        """Return the rank of the device whose block of keys is held in round `step`."""
        return (self.rank - step) % self.size

    def _send_to_neighbor(self, tree: Any) -> Any:
        """Send arrays to the next device of the ring and return those of the previous one."""
        ring = [(i, (i + 1) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.setting.split.length, ring), tree)


def if_needed(is_needed: Array | None, is_first: Any, compute: Any, carry: Any) -> Any:
    """Return `compute(carry)`, or `carry` if neither `is_first` nor `is_needed`; None: needed.

    The first keys of each chunk of queries are always computed, so that every query has at least one score and `total`
    is not 0.
    """
    if is_needed is None:
        return compute(carry)
    # `compute` has no collective operation, so that devices may decide differently.
    return jax.lax.cond(is_first | is_needed, compute, lambda carry: carry, carry)


def mesh_size(split: SequenceSharding, axes: tuple[str, ...]) -> int:
    """Return the number of devices along mesh axes."""
    return math.prod(split.mesh.shape[axis] for axis in axes)


def mesh_rank(axes: tuple[str, ...]) -> Array | int:
    """Return the rank of this device along mesh axes."""
    return jax.lax.axis_index(axes) if axes else 0
