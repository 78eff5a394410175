"""Order of a sequence over the devices of a ring: contiguous, or zigzag, which balances causal attention.

Under a causal mask the device with the last block of a sequence has as many visible blocks of keys as there are
devices, and the first device has one. In the zigzag order the sequence has two chunks per device, and device d of n
holds the chunks d and 2 n - 1 - d: in every round each device then has the same number of visible pairs of chunks (as
in Llama 3, Grattafiori et al. 2024, section 3.3.2). Arrays arrive and leave contiguous; the exchange is inside
`shard_map`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True)
class Layout:
    """Order of a sequence of which each device has `length` positions.

    Attributes:
      devices: Number of devices of the ring.
      length: Positions on one device.
      is_zigzag: Two chunks per device in the zigzag order, and not one block.
    """

    devices: int
    length: int
    is_zigzag: bool

    @property
    def chunks(self) -> int:
        """Number of chunks on a device."""
        return 2 if self.is_zigzag else 1

    @property
    def chunk_length(self) -> int:
        return self.length // self.chunks

    def starts(self, rank: Any) -> tuple[Any, ...]:
        """Return the index of the first position of each chunk of a device, in the whole sequence.

        Args:
          rank: Rank of the device, an integer or a traced one.
        """
        if not self.is_zigzag:
            return (rank * self.length,)
        return rank * self.chunk_length, (2 * self.devices - 1 - rank) * self.chunk_length

    def split(self, x: Array, axis: int) -> list[Array]:
        """Return the chunks of an array of one device."""
        return jnp.split(x, self.chunks, axis=axis)

    def stack(self, x: Array, axis: int) -> Array:
        """Return the chunks of an array of one device along a new first axis."""
        return jnp.stack(self.split(x, axis))

    def join(self, x: Array, axis: int) -> Array:
        """Return the inverse of `stack`."""
        return jnp.concatenate(list(x), axis)

    def from_contiguous(self, x: Array, axis: int, mesh_axes: tuple[str, ...]) -> Array:
        """Return this device's chunks of an array that is contiguous over the devices; call it within `shard_map`."""
        if not self.is_zigzag:
            return x
        even, odd = (
            jax.lax.ppermute(chunk, mesh_axes, [(d, self._owner(2 * d + part)) for d in range(self.devices)])
            for part, chunk in enumerate(self.split(x, axis))
        )
        # The even chunks go to the devices of even rank as their first one, and to the others as their second one.
        is_even = jax.lax.axis_index(mesh_axes) % 2 == 0
        return jnp.concatenate([jnp.where(is_even, even, odd), jnp.where(is_even, odd, even)], axis)

    def to_contiguous(self, x: Array, axis: int, mesh_axes: tuple[str, ...]) -> Array:
        """Return the inverse of `from_contiguous`."""
        if not self.is_zigzag:
            return x
        first, second = self.split(x, axis)
        is_even = jax.lax.axis_index(mesh_axes) % 2 == 0
        chunks = (jnp.where(is_even, first, second), jnp.where(is_even, second, first))
        return jnp.concatenate(
            [
                jax.lax.ppermute(chunk, mesh_axes, [(self._owner(2 * d + part), d) for d in range(self.devices)])
                for part, chunk in enumerate(chunks)
            ],
            axis,
        )

    def _owner(self, chunk: int) -> int:
        """Return the rank of the device that has a chunk in the zigzag order."""
        return min(chunk, 2 * self.devices - 1 - chunk)
