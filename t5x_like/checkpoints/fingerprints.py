"""Fingerprints of arrays, computed on the devices that hold them: from memory to disk and back, no bit may change.

Checksums of files protect bytes from the moment when they are written. A fingerprint is taken of the arrays in the
memory of the devices when a save begins, and compared with that of the restored ones, so that it covers the copies in
between as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.sharding.batch_placement import on_host

FINGERPRINTS = "fingerprints"
"""Entry of meta.json: the fingerprint of each array when it was saved."""
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
"""Type of the words that an element is read as, by its bytes."""


def fingerprints(leaves: Mapping[str, jax.Array]) -> dict[str, str]:
    """Return the fingerprint of each array by path, in hexadecimal. All processes must call it.

    It depends on the bits, on their places and on nothing else: not on the sharding, and not on the order in which
    devices add. Arrays that differ in one element never have the same one; others have with a probability of 2**-32.
    """
    # One program serves all arrays that the same devices hold.
    by_devices: dict[frozenset[jax.Device], list[str]] = {}
    for path, leaf in leaves.items():
        by_devices.setdefault(frozenset(leaf.sharding.device_set), []).append(path)
    found: dict[str, str] = {}
    for paths in by_devices.values():
        values = on_host(_fingerprints([leaves[path] for path in paths]))
        found |= {path: f"{int(value):08x}" for path, value in zip(paths, values, strict=True)}
    return {path: found[path] for path in leaves}


def changes(leaves: Mapping[str, jax.Array], saved: Mapping[str, str] | None) -> str | None:
    """Return which restored arrays differ from those that were saved; None if none do. All processes must call it.

    Args:
      leaves: The restored arrays by path.
      saved: Fingerprints of at least these, None if the checkpoint has none, since another version wrote it.
    """
    if saved is None:
        return None
    changed = [path for path, value in fingerprints(leaves).items() if saved[path] != value]
    listed = ", ".join(changed[:5]) + (f" and {len(changed) - 5} others" if len(changed) > 5 else "")
    return f"found other values than were in memory when it was saved, in {listed}" if changed else None


@jax.jit
def _fingerprints(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([fingerprint(leaf) for leaf in leaves])


def fingerprint(x: jax.Array) -> jax.Array:
    """Return the fingerprint of an array: the sum of a mixture of value and place, modulo 2**32; uint32 []."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    # 64-bit types become pairs of words, in a further dimension.
    words = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for dimension in range(words.ndim):
        stride = math.prod(words.shape[dimension + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, dimension) * jnp.uint32(stride)
    # Integer sums are exact in any order. Each step of `_mix` is invertible, so a changed word changes the sum.
    return jnp.sum(_mix(words ^ _mix(place + jnp.uint32(0x9E3779B9))), dtype=jnp.uint32)


def fingerprint_of_part(values: np.ndarray, place: Sequence[slice], shape: Sequence[int]) -> int:
    """Return what a part of an array adds to its fingerprint, computed by NumPy.

    Args:
      values: The part.
      place: Its place in the array, a slice for each dimension.
      shape: Shape of the array.
    """
    word = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}[values.dtype.itemsize]
    starts, lengths = [part.start for part in place], list(shape)
    words = np.frombuffer(values.tobytes(), word)
    if values.dtype.itemsize == 8:
        starts, lengths = [*starts, 0], [*lengths, 2]
        words = words.reshape((*values.shape, 2))
    else:
        words = words.reshape(values.shape)
    # One dimension at least: NumPy warns of an overflow of scalars, which is meant here.
    index = np.zeros(1, np.uint32)
    for dimension in range(words.ndim):
        stride = math.prod(lengths[dimension + 1 :]) % 2**32
        numbers = (np.arange(words.shape[dimension], dtype=np.uint64) + np.uint64(starts[dimension])).astype(np.uint32)
        index = index + (numbers * np.uint32(stride)).reshape((-1, *([1] * (words.ndim - 1 - dimension))))
    mixed = _mix(words.astype(np.uint32) ^ _mix(index + np.uint32(0x9E3779B9)))
    return int(np.sum(mixed, dtype=np.uint64)) % 2**32


def _mix(x: Any) -> Any:
    """Return the finalizer of MurmurHash3 (Appleby 2011), a permutation of uint32."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
