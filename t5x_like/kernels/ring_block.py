"""Computations of one device of a ring: its queries with the keys that it holds, chunk by chunk.

Shape letters in lower case are sizes on one device: b rows, q queries and k keys of a chunk, h query heads, g key
heads, r query heads per key head, x head width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from t5x_like.kernels.attention_masks import MaskSpec, SequenceSharding, dense_mask
from t5x_like.kernels.dropout import keep_mask_block
from t5x_like.kernels.online_softmax import Scores, block_scores
from t5x_like.kernels.position_bias import RelativeBias, dense_bias
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
class RingSetting:
    """Static part of a call; hashable, so that `custom_vjp` takes it as an argument that is not differentiated.

    Attributes:
      layout: Order of the queries over the devices.
      keys: Settings of each sequence of keys.
      shared_dropout: One dropout mask for all queries.
    """

    split: SequenceSharding
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


class DeviceBlock:
    """Computations of one device inside `shard_map`: scores, masks and dropout of its queries with the keys it holds.

    Queries are [b, g, r, q, x] and keys [b, g, k, x].
    """

    def __init__(self, setting: RingSetting, q: Array, tables: Arrays, mask_arrays: Arrays):
        self.setting, self.tables, self.mask_arrays = setting, tables, mask_arrays
        self.size = setting.layout.devices
        # Blocks are numbered along the length over these axes with the outermost first, as `PartitionSpec` splits it.
        self.rank = jax.lax.axis_index(setting.split.length)
        self.rows, self.heads, self.width = q.shape[0], q.shape[2], q.shape[3]

    def pairs(self, number: int, source: Array) -> list[list[Pair]]:
        """Return the pairs with the keys of the device of rank `source`: a list for each chunk of the queries."""
        own, keys = self.setting.layout, self.setting.keys[number].layout
        return [
            [Pair(number, q, kv, own.chunk_length, keys.chunk_length) for kv in keys.starts(source)]
            for q in own.starts(self.rank)
        ]

    def scores(self, pair: Pair, q: Array, k: Array, visible: Array | None) -> Scores:
        """Return the scores [b, g, r, q, k] under the mask `visible`."""
        table = self.tables.get(f"table_{pair.number}")
        bias = None if table is None else self.bias(table, pair)
        return block_scores(q, k, softcap=self.setting.softcap, bias=bias, visible=visible)

    def bias(self, table: Array, pair: Pair) -> Array:
        """Return T5's bias of these queries and keys, [1, h, q, k]."""
        settings = self.setting.keys[pair.number]
        relative_bias = RelativeBias(table, settings.bidirectional, settings.max_distance)
        # Index of the first key minus that of the first query, in the whole sequence; the bias needs differences only.
        return dense_bias(relative_bias, pair.q_length, pair.kv_length, offset=pair.kv_start - pair.q_start)

    def visible(self, pair: Pair) -> Array | None:
        """Return the mask, bool [1 or b, 1, 1, 1 or q, k], or None if every key is visible."""
        settings, number = self.setting.keys[pair.number], pair.number

        def part(name: str) -> Array | None:
            # These arrays are whole on every device: take the part of the chunk.
            x = self.mask_arrays.get(f"{name}_{number}")
            if x is None:
                return None
            is_q = name.startswith("q")
            start, length = (pair.q_start, pair.q_length) if is_q else (pair.kv_start, pair.kv_length)
            return jax.lax.dynamic_slice_in_dim(x, start, length, axis=1)

        dynamic = self.mask_arrays.get(f"dynamic_window_{number}")
        window: Any = settings.window if dynamic is None else (dynamic[0], dynamic[1])
        mask = MaskSpec(
            causal=settings.causal,
            window=window,
            q_positions=(pair.q_start + jnp.arange(pair.q_length))[None],
            kv_positions=(pair.kv_start + jnp.arange(pair.kv_length))[None],
            q_segment_ids=part("q_segment_ids"),
            kv_segment_ids=part("kv_segment_ids"),
            q_prefix=part("q_prefix"),
            kv_prefix=part("kv_prefix"),
        )
        dense = dense_mask(mask, pair.q_length, pair.kv_length)
        return None if dense is None else dense[:, :, None]

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
        kv_lengths = [self.size * keys.layout.length for keys in self.setting.keys]
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
        """Return keys and values with the heads that this device's queries read, [b, g, k, x] each."""
        kv_heads = kvs["k_0"].shape[2] * mesh_size(self.setting.split, self.setting.split.kv_heads)
        return {name: jnp.swapaxes(self.own_heads(x, kv_heads), 1, 2) for name, x in kvs.items()}

    def arranged(self, kvs: Arrays) -> dict[str, Array]:
        """Return keys and values [b, k, g, x] in the layouts of their sequences, from contiguous ones."""
        axes = self.setting.split.length
        return {name: self._layout(name).from_contiguous(x, 1, axes) for name, x in kvs.items()}

    def contiguous(self, kvs: Arrays) -> dict[str, Array]:
        """Return the inverse of `arranged`."""
        axes = self.setting.split.length
        return {name: self._layout(name).to_contiguous(x, 1, axes) for name, x in kvs.items()}

    def _layout(self, name: str) -> Layout:
        return self.setting.keys[int(name.rpartition("_")[2])].layout

    def source_of(self, step: Array) -> Array:
        """Return the rank of the device whose block of keys is held in round `step`."""
        return (self.rank - step) % self.size

    def send_to_neighbor(self, tree: Any) -> Any:
        """Send arrays to the next device of the ring and return those of the previous one."""
        ring = [(i, (i + 1) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.setting.split.length, ring), tree)


def mesh_size(split: SequenceSharding, axes: tuple[str, ...]) -> int:
    """Return the number of devices along mesh axes."""
    return math.prod(split.mesh.shape[axis] for axis in axes)


def mesh_rank(axes: tuple[str, ...]) -> Array | int:
    """Return the rank of this device along mesh axes."""
    return jax.lax.axis_index(axes) if axes else 0
