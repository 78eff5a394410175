"""What a decoder remembers of the tokens before."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax import Array

from t5x_like.models.attention import KeysValues


class Cache(NamedTuple):
    """A pytree of fixed shapes. Rows are dimension 1 of keys and values (dimension 0 is the layer), and dimension 0 of
    positions, valid and encoder_segment_ids; `next_slot` is shared by all rows.

    Attributes:
      keys, values: [layers, B, K, G, h], in the model's computing type.
      positions: int32 [B, K], the position of each slot's token in its row.
      valid: bool [B, K], False for slots with padding or nothing.
      next_slot: int32 scalar, the first free slot.
      cross_keys, cross_values: [layers, B, S, G, h] of the encoder's states, or None without an encoder.
      encoder_segment_ids: int32 [B, S], 0 for padding, or None.
    """

    keys: Array
    values: Array
    positions: Array
    valid: Array
    next_slot: Array
    cross_keys: Array | None = None
    cross_values: Array | None = None
    encoder_segment_ids: Array | None = None

    @property
    def length(self) -> int:
        """Slots per row."""
        return self.keys.shape[2]

    def remember(self, positions_BxT: Array, valid_BxT: Array) -> Cache:
        """With positions and validity of the tokens for the next slots."""
        positions = self._placed(self.positions, positions_BxT, axis=1)
        return self._replace(positions=positions, valid=self._placed(self.valid, valid_BxT, axis=1))

    def append(self, keys_values: KeysValues) -> Cache:
        """With keys and values [layers, B, T, G, h] in the next slots, which are then taken."""
        keys, values = (
            self._placed(old, new, axis=2) for old, new in zip((self.keys, self.values), keys_values, strict=True)
        )
        return self._replace(keys=keys, values=values, next_slot=self.next_slot + keys_values[0].shape[2])

    def _placed(self, old: Array, new: Array, *, axis: int) -> Array:
        """`old` with `new` in the next slots, which count along `axis`."""
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), self.next_slot, axis=axis)
