"""Random masks for dropout with 16 random bits per element in place of JAX's 32."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.extend
import jax.numpy as jnp
from jax import Array


def keep_mask(rng: Array, keep_probability: float, shape: Sequence[int]) -> Array:
    """A bool array of `shape`, True with `keep_probability` (to within 2**-17).

    Words of 32 bits are drawn for half of the last dimension and split, which halves the cost of the mask and keeps it
    the same however the array is split over devices.
    """
    threshold = min(round(keep_probability * 2**16), 2**16 - 1)
    *leading, last = shape
    words = jax.random.bits(rng, (*leading, math.ceil(last / 2)), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*leading, -1)[..., :last]
    return halves < threshold


def keep_mask_block(
    rng: Array, keep_probability: float, shape: Sequence[int], starts: Sequence[Array | int], block: Sequence[int]
) -> Array:
    """The part of `keep_mask(rng, keep_probability, shape)` that begins at `starts`, bool of shape `block`.

    Each word of JAX's Threefry generator is a function of the key and of the word's place, so that a device makes its
    part of a mask by itself, and the whole need not exist. With another generator the part is as random, but that of
    no whole: it has a key of its own, made from `starts`.
    """
    threshold = min(round(keep_probability * 2**16), 2**16 - 1)
    partitionable = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
    if jax.random.key_impl(rng) != "threefry2x32" or not partitionable:
        for start in starts:
            rng = jax.random.fold_in(rng, start)
        return keep_mask(rng, keep_probability, block)
    key = rng if rng.dtype == jnp.uint32 else jax.random.key_data(rng)
    *leading, last = shape
    strides = [math.prod([*leading[dim + 1 :], math.ceil(last / 2)]) for dim in range(len(leading))]
    high = low = jnp.zeros((1,) * len(block), jnp.uint32)
    cells = [start + jax.lax.broadcasted_iota(jnp.int32, block, dim) for dim, start in enumerate(starts)]
    for cell, stride in zip(cells[:-1], strides, strict=True):
        high, low = _sum_64((high, low), _product_64(cell.astype(jnp.uint32), stride))
    high, low = _sum_64((high, low), (jnp.zeros_like(low), (cells[-1] // 2).astype(jnp.uint32)))
    words = functools.reduce(
        jnp.bitwise_xor, jax.extend.random.threefry2x32_p.bind(key[0], key[1], *jnp.broadcast_arrays(high, low))
    )
    halves = (words >> (16 * (cells[-1] % 2)).astype(jnp.uint32)) & 0xFFFF
    return halves < threshold


def _sum_64(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """The sum of two numbers of 64 bits, each as (high, low) words."""
    low = a[1] + b[1]
    return a[0] + b[0] + (low < a[1]).astype(jnp.uint32), low


def _product_64(a: Array, factor: int) -> tuple[Array, Array]:
    """a * factor as (high, low) words, by halves of 16 bits."""
    factor_high, factor_low = divmod(factor, 2**32)
    a1, a0, f1, f0 = a >> 16, a & 0xFFFF, jnp.uint32(factor_low >> 16), jnp.uint32(factor_low & 0xFFFF)
    zero = jnp.zeros_like(a)
    total = (a1 * f1 + a * jnp.uint32(factor_high), a0 * f0)
    for part in (a0 * f1, a1 * f0):
        total = _sum_64(total, (part >> 16, part << 16))
    return total[0] + zero, total[1]
