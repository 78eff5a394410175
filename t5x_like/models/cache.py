"""What a decoder remembers of the tokens before: keys and values in slots, one number of tokens per row.

Token p of a row lies in slot p mod K of its K slots. Layers that see everything have a slot for each token, and never
wrap; local layers have as many as their window and the widest step need, and forget what is older. So a slot's position
follows from the row's length, padding has no slot, and setting a row's length back is all that undoes its last tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from t5x_like.partitioning.constrain import constrain, is_split

KeysValues = tuple[Array, Array]
"""[B, T, G, h] each, as the projections make them."""

_SLOTS = ("batch", "kv_heads", None, "head_dim")


class Slots(NamedTuple):
    """Keys and values of one layer, heads before slots, so that what one head reads lies together.

    Attributes:
      keys, values: [B, G, K, h], in a float type, or int8 with scales.
      key_scales, value_scales: float32 [B, G, K]: a slot's numbers are int8 times its scale. None for floats.
    """

    keys: Array
    values: Array
    key_scales: Array | None = None
    value_scales: Array | None = None

    @property
    def size(self) -> int:
        """Slots per row."""
        return self.keys.shape[2]

    @property
    def dtype(self) -> jnp.dtype:
        return self.keys.dtype

    def floats(self, dtype: jnp.dtype) -> KeysValues:
        """Keys and values [B, K, G, h]."""
        read = (_dequantized(self.keys, self.key_scales, dtype), _dequantized(self.values, self.value_scales, dtype))
        return jnp.swapaxes(read[0], 1, 2), jnp.swapaxes(read[1], 1, 2)

    def filled(self, new: KeysValues, lengths_B: Array) -> Slots:
        """With the first `lengths_B` of T tokens of each row, whose positions begin at 0; what was there is lost."""
        tokens = stored(new, self.dtype)
        if tokens.size > self.size:
            # Of a ring, the slot's newest token; slots without one get something that nobody sees.
            newest_BxK = jnp.clip(slot_positions(lengths_B, self.size), 0)

            def rolled(leaf: Array) -> Array:
                index = newest_BxK[:, None, :, None] if leaf.ndim == 4 else newest_BxK[:, None, :]
                return jnp.take_along_axis(leaf, index, axis=2)

            return jax.tree.map(rolled, tokens)

        def at_start(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, 0, axis=2)

        return _constrained(jax.tree.map(at_start, self, tokens))

    def written(self, new: KeysValues, lengths_B: Array) -> Slots:
        """With T tokens behind the first `lengths_B` of each row: the slots' older tokens are lost.

        T is no more than the widest step that the cache was made for, so that there is room and no key is lost that
        the first of the new tokens still sees.
        """
        tokens = stored(new, self.dtype)
        start_B = lengths_B % self.size
        wraps = tokens.size > 1
        slots = jax.tree.map(lambda old, new: _written(old, new, start_B, wraps), self, tokens)
        return _constrained(slots)


class Cache(NamedTuple):
    """A pytree of fixed shapes; dimension 0 of every array is the row.

    Attributes:
      lengths: int32 [B], tokens of each row. Setting one to less undoes the last tokens, up to the widest step that the
        cache was made for; 0 empties the row.
      layers: The slots of each layer of the decoder.
      cross: Keys and values of the encoder's states for each layer, or None without an encoder.
      encoder_segment_ids: int32 [B, S], 0 for padding, or None.
    """

    lengths: Array
    layers: tuple[Slots, ...]
    cross: tuple[Slots, ...] | None = None
    encoder_segment_ids: Array | None = None

    @property
    def rows(self) -> int:
        return self.lengths.shape[0]

    def rolled_back(self, lengths_B: Array) -> Cache:
        """With these lengths, which are no longer than the present ones."""
        return self._replace(lengths=jnp.minimum(self.lengths, lengths_B))

    def reorder(self, rows_B: Array, *, same_encoder: bool = True) -> Cache:
        """Row i becomes row `rows_B[i]`: beams that go on.

        Args:
          rows_B: int32 [B].
          same_encoder: Rows only move among those that read the same encoder input, so that what came of it stays.
        """
        moved = jax.tree.map(lambda leaf: jnp.take(leaf, rows_B, axis=0), (self.lengths, self.layers))
        cache = self._replace(lengths=moved[0], layers=moved[1])
        if same_encoder or self.cross is None:
            return cache
        cross, ids = jax.tree.map(lambda leaf: jnp.take(leaf, rows_B, axis=0), (self.cross, self.encoder_segment_ids))
        return cache._replace(cross=cross, encoder_segment_ids=ids)

    def put(self, row: Array | int, other: Cache) -> Cache:
        """With the rows of `other`, which is alike but for their number, from row `row` on."""
        return jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, row, axis=0), self, other)


def empty_slots(rows: int, kv_heads: int, count: int, head_dim: int, dtype: jnp.dtype) -> Slots:
    shape = (rows, kv_heads, count, head_dim)
    zeros, scales = jnp.zeros(shape, dtype), jnp.zeros(shape[:3], jnp.float32)
    slots = Slots(zeros, zeros, scales, scales) if dtype == jnp.int8 else Slots(zeros, zeros)
    return _constrained(slots)


def stored(new: KeysValues, dtype: jnp.dtype) -> Slots:
    """Slots of exactly these tokens."""
    keys, values = (jnp.swapaxes(x, 1, 2) for x in new)
    if dtype != jnp.int8:
        return _constrained(Slots(keys.astype(dtype), values.astype(dtype)))
    (keys, key_scales), (values, value_scales) = _quantized(keys), _quantized(values)
    return _constrained(Slots(keys, values, key_scales, value_scales))


def slot_positions(lengths_B: Array, count: int) -> Array:
    """int32 [B, K]: which token lies in each of K slots of rows with so many tokens; below 0: none."""
    slots = jnp.arange(count)
    return slots + count * ((lengths_B[:, None] - 1 - slots) // count)


def _quantized(x_BxGxTxh: Array) -> tuple[Array, Array]:
    """int8 [B, G, T, h] and float32 scales [B, G, T]; the error of a number is half a scale at most, and the scale is
    the 127th part of the largest number of the head's slot."""
    x = x_BxGxTxh.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1) / 127.0
    quantized = jnp.round(x / jnp.where(scales == 0, 1.0, scales)[..., None])
    return quantized.astype(jnp.int8), scales


def _dequantized(x: Array, scales: Array | None, dtype: jnp.dtype) -> Array:
    return x.astype(dtype) if scales is None else (x * scales[..., None]).astype(dtype)


def _written(old: Array, new: Array, start_B: Array, wraps: bool) -> Array:
    """`old` [B, G, K, ...] with `new` [B, G, T, ...] at slots `start_B` and behind, around the end if it `wraps`."""

    def one(old: Array, new: Array, start: Array) -> Array:
        if wraps:
            slots = (start + jnp.arange(new.shape[1])) % old.shape[1]
            return old.at[:, slots].set(new, unique_indices=True)
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)

    def by_rows(old: Array, new: Array, start_B: Array) -> Array:
        """In place, where XLA's scatter on CPU copies and is slow."""

        def write(number: Array, old: Array) -> Array:
            row, token = number // new.shape[2], number % new.shape[2]
            one = jax.lax.dynamic_slice_in_dim(jax.lax.dynamic_slice_in_dim(new, row, 1, axis=0), token, 1, axis=2)
            zero = jnp.zeros_like(row)
            start = [row, zero, (start_B[row] + token) % old.shape[2], zero]
            return jax.lax.dynamic_update_slice(old, one, start[: old.ndim])

        # A loop of one round, if XLA knew it, would be unrolled, and the write become part of all that reads it: for a
        # single row two copies of the cache, at each step.
        count = jnp.sum(start_B >= 0) * new.shape[2]
        return jax.lax.fori_loop(0, count, write, old)

    scattered = jax.vmap(one)
    if is_split():
        return scattered(old, new, start_B)
    return jax.lax.platform_dependent(old, new, start_B, cpu=by_rows, default=scattered)


def _constrained(slots: Slots) -> Slots:
    return jax.tree.map(lambda leaf: constrain(leaf, _SLOTS[: leaf.ndim]), slots)
