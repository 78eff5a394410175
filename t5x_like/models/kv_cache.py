"""Key-value cache for decoding: keys and values of past tokens in slots, with a length per row.

Token p of a row is stored in slot p mod K of the layer's K slots. Global layers have a slot for each token and never
wrap around. Local layers are ring buffers with as many slots as their window and the widest step need; older tokens are
overwritten. The position of a slot therefore follows from the row's length, padding takes no slot, and reducing a row's
length is enough to undo its last tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from t5x_like.sharding.constrain import constrain, is_split

KeysValues = tuple[Array, Array]
"""Keys and values [B, T, G, h] each, as the projections return them."""

_SLOTS = ("batch", "kv_heads", None, "head_dim")


class LayerCache(NamedTuple):
    """Keys and values of one layer. Heads come before slots, so that the numbers that one head reads are contiguous.

    Attributes:
      keys: [B, G, K, h] in a float type, or int8 with scales.
      values: [B, G, K, h] in a float type, or int8 with scales.
      key_scales: float32 [B, G, K]; a key is its int8 numbers times its scale. None for float types.
      value_scales: float32 [B, G, K]; None for float types.
    """

    keys: Array
    values: Array
    key_scales: Array | None = None
    value_scales: Array | None = None

    @property
    def size(self) -> int:
        """Number of slots per row."""
        return self.keys.shape[2]

    @property
    def dtype(self) -> jnp.dtype:
        return self.keys.dtype

    def dequantize(self, dtype: jnp.dtype) -> KeysValues:
        """Return keys and values of all slots in a float type, [B, K, G, h] each."""
        floats = (_dequantized(self.keys, self.key_scales, dtype), _dequantized(self.values, self.value_scales, dtype))
        return jnp.swapaxes(floats[0], 1, 2), jnp.swapaxes(floats[1], 1, 2)

    def prefill(self, new: KeysValues, lengths_B: Array) -> LayerCache:
        """Return the cache with the first `lengths_B` of T tokens of each row, at positions from 0 on.

        Earlier contents are discarded.
        """
        tokens = to_layer_cache(new, self.dtype)
        if tokens.size > self.size:
            # A ring buffer keeps the newest token of each slot. Slots without a token get arbitrary values, which the
            # mask hides.
            # Slot s gets token p, the largest p with p mod K = s: where appending the prompt token by token would have
            # left it.
            newest_BxK = jnp.clip(slot_positions(lengths_B, self.size), 0)

            def rolled(leaf: Array) -> Array:
                index = newest_BxK[:, None, :, None] if leaf.ndim == 4 else newest_BxK[:, None, :]
                return jnp.take_along_axis(leaf, index, axis=2)

            return jax.tree.map(rolled, tokens)

        def at_start(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, 0, axis=2)

        return _constrained(jax.tree.map(at_start, self, tokens))

    def append(self, new: KeysValues, lengths_B: Array) -> LayerCache:
        """Return the cache with T tokens after the first `lengths_B` of each row; they overwrite the slots' older
        tokens.

        T must not exceed the widest step that the cache was made for. Then there are enough free slots, and no
        key is overwritten that the first of the new tokens still attends to.
        """
        tokens = to_layer_cache(new, self.dtype)
        start_B = lengths_B % self.size
        # A single token never crosses the end of the buffer: its write is one contiguous update.
        wraps = tokens.size > 1
        return _constrained(jax.tree.map(lambda old, new: _write_slots(old, new, start_B, wraps), self, tokens))


class KVCache(NamedTuple):
    """Cache of a decoder: a pytree of fixed shapes whose arrays, except `beams`, have the row as dimension 0.

    Attributes:
      lengths: int32 [B], number of tokens of each row. Reducing it undoes the last tokens, up to the widest step that
        the cache was made for; 0 empties the row.
      layers: Cache of each decoder layer.
      cross: Keys and values of the encoder's states for each layer, or None without an encoder.
      encoder_segment_ids: int32 [B, S], 0 for padding, or None.
      beams: None but in a beam search, whose rows are the beams of R prompts, side by side: number of slots of a layer
        K -> int32 [R, beams, K], the beam of the same prompt in whose row the token lies that a beam has in a slot. The
        encoder's arrays then have a row per prompt. Tokens stay where they were written when beams are exchanged.
    """

    lengths: Array
    layers: tuple[LayerCache, ...]
    cross: tuple[LayerCache, ...] | None = None
    encoder_segment_ids: Array | None = None
    beams: Mapping[int, Array] | None = None

    @property
    def rows(self) -> int:
        return self.lengths.shape[0]

    def truncate(self, lengths_B: Array) -> KVCache:
        """Return the cache with rows cut to `lengths_B`; longer ones leave a row as it is."""
        # The contents stay. The slot of a token that was undone now counts as holding the token K positions before it.
        # That is below 0, an empty slot, in a global layer, and outside the window in a local one, whose K exceeds the
        # window by the widest step.
        return self._replace(lengths=jnp.minimum(self.lengths, lengths_B))

    def for_beams(self, count: int) -> KVCache:
        """Return the cache of a beam search in which each row has become `count` equal ones."""

        def repeated(leaf: Array) -> Array:
            return jnp.repeat(leaf, count, axis=0)

        own = jnp.arange(count, dtype=jnp.int32)[:, None]
        sizes = {layer.size for layer in self.layers}
        return self._replace(
            lengths=repeated(self.lengths),
            layers=jax.tree.map(repeated, self.layers),
            beams={size: jnp.broadcast_to(own, (self.rows, count, size)) for size in sizes},
        )

    def follow_beams(self, parents_RxB: Array) -> KVCache:
        """Return the cache in which each beam has the tokens of a beam of the same prompt, before its next token.

        No token is moved. The next token of each beam is written to the beam's own row.
        """
        assert self.beams is not None
        prompts, count = parents_RxB.shape
        own = jnp.arange(count, dtype=jnp.int32)[None, :, None]
        lengths = jnp.take_along_axis(self.lengths.reshape(prompts, count), parents_RxB, axis=1)
        beams = {}
        for size, table in self.beams.items():
            inherited = jnp.take_along_axis(table, parents_RxB[:, :, None], axis=1)
            is_next = jnp.arange(size) == (lengths % size)[:, :, None]
            beams[size] = jnp.where(is_next, own, inherited)
        return self._replace(lengths=lengths.reshape(-1), beams=beams)

    def insert_rows(self, row: Array | int, other: KVCache) -> KVCache:
        """Return the cache with the rows of `other` written from row `row` on; both differ in the number of rows
        only, and are not those of a beam search."""
        # The table of a beam search has a row per prompt.
        assert self.beams is None and other.beams is None
        # All leaves have the row as dimension 0, so one rule copies keys, scales, lengths and segment ids.
        return jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, row, axis=0), self, other)


def empty_layer_cache(rows: int, kv_heads: int, count: int, head_dim: int, dtype: jnp.dtype) -> LayerCache:
    """Return a cache of zeros with `count` slots per row."""
    shape = (rows, kv_heads, count, head_dim)
    zeros, scales = jnp.zeros(shape, dtype), jnp.zeros(shape[:3], jnp.float32)
    return _constrained(LayerCache(zeros, zeros, scales, scales) if dtype == jnp.int8 else LayerCache(zeros, zeros))


def to_layer_cache(new: KeysValues, dtype: jnp.dtype) -> LayerCache:
    """Return a cache of exactly these tokens, quantized if `dtype` is int8."""
    keys, values = (jnp.swapaxes(x, 1, 2) for x in new)
    if dtype != jnp.int8:
        return _constrained(LayerCache(keys.astype(dtype), values.astype(dtype)))
    (keys, key_scales), (values, value_scales) = _quantized(keys), _quantized(values)
    return _constrained(LayerCache(keys, values, key_scales, value_scales))


def slot_positions(lengths_B: Array, count: int) -> Array:
    """Return the position of the token in each of `count` slots, int32 [B, K]; below 0 for empty slots.

    Args:
      lengths_B: Number of tokens of each row.
      count: Number of slots K.
    """
    # The largest p < length with p mod K = slot.
    # Floor division rounds towards minus infinity, so that a slot that was never written gets a position below 0.
    slots = jnp.arange(count)
    return slots + count * ((lengths_B[:, None] - 1 - slots) // count)


def _quantized(x_BxGxTxh: Array) -> tuple[Array, Array]:
    """Return int8 [B, G, T, h] and float32 scales [B, G, T].

    The scale is 1 / 127 of the largest absolute value of the head and slot; the error is at most half a scale.
    """
    x = x_BxGxTxh.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1) / 127.0
    # A vector of zeros has scale 0, which also stands for it exactly.
    quantized = jnp.round(x / jnp.where(scales == 0, 1.0, scales)[..., None])
    return quantized.astype(jnp.int8), scales


def _dequantized(x: Array, scales: Array | None, dtype: jnp.dtype) -> Array:
    return x.astype(dtype) if scales is None else (x * scales[..., None]).astype(dtype)


def _write_slots(old: Array, new: Array, start_B: Array, wraps: bool) -> Array:
    """Return `old` [B, G, K, ...] with `new` [B, G, T, ...] in the slots from `start_B` on, modulo K if it `wraps`."""

    def one(old: Array, new: Array, start: Array) -> Array:
        if wraps:
            slots = (start + jnp.arange(new.shape[1])) % old.shape[1]
            # T is at most K, so no slot is written twice, and XLA needs no order of the writes.
            return old.at[:, slots].set(new, unique_indices=True)
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)

    def by_rows(old: Array, new: Array, start_B: Array) -> Array:
        """Write token by token in place: XLA's scatter on CPU is slow and copies the array."""

        def write(number: Array, old: Array) -> Array:
            row, token = number // new.shape[2], number % new.shape[2]
            value = jax.lax.dynamic_slice_in_dim(jax.lax.dynamic_slice_in_dim(new, row, 1, axis=0), token, 1, axis=2)
            zero = jnp.zeros_like(row)
            start = [row, zero, (start_B[row] + token) % old.shape[2], zero]
            return jax.lax.dynamic_update_slice(old, value, start[: old.ndim])

        # The sum is always the number of tokens, but XLA cannot know that. A loop of one known iteration would be
        # unrolled and its write fused into every reader, which for a single row costs two copies of the cache at each
        # step.
        count = jnp.sum(start_B >= 0) * new.shape[2]
        return jax.lax.fori_loop(0, count, write, old)

    scattered = jax.vmap(one)
    # On a split cache a loop over rows would make every device visit the rows of all others.
    if is_split():
        return scattered(old, new, start_B)
    return jax.lax.platform_dependent(old, new, start_B, cpu=by_rows, default=scattered)


def _constrained(cache: LayerCache) -> LayerCache:
    return jax.tree.map(lambda leaf: constrain(leaf, _SLOTS[: leaf.ndim]), cache)
