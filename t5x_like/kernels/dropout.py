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
    """Return a bool array of `shape`, True with `keep_probability` (to within 2**-17).

    Words of 32 bits are drawn for half of the last dimension and split into two numbers of 16 bits. This halves the
    cost of the mask, and the mask does not depend on how the array is split over devices.
    """
    threshold = min(round(keep_probability * 2**16), 2**16 - 1)
    *leading, last = shape
    words = jax.random.bits(rng, (*leading, math.ceil(last / 2)), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*leading, -1)[..., :last]
    return halves < threshold


def keep_mask_block(
    rng: Array, keep_probability: float, shape: Sequence[int], starts: Sequence[Array | int], block: Sequence[int]
) -> Array:
    """Return the part of `keep_mask(rng, keep_probability, shape)` that begins at `starts`, bool of shape `block`.

    Each word of JAX's Threefry generator is a function of the key and of the word's index, so that a device computes
    its part of a mask by itself and the whole mask need not exist. With another generator the part is equally random,
    but it is not a part of any whole mask: its key is derived from `starts`.

    Args:
      rng: Key of the whole mask.
      keep_probability: Probability of True.
      shape: Shape of the whole mask.
      starts: Index of the block's first element in each dimension; traced or not.
      block: Shape of the result.
    """
    threshold = min(round(keep_probability * 2**16), 2**16 - 1)
    partitionable = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
    if jax.random.key_impl(rng) != "threefry2x32" or not partitionable:
        # The values of other generators depend on the shape of the whole draw, so that a block cannot be computed
        # alone.
        for start in starts:
            rng = jax.random.fold_in(rng, start)
        return keep_mask(rng, keep_probability, block)
    # `keep_mask` draws words of shape [*leading, ceil(last / 2)]; word number n is the xor of the two halves of
    # threefry2x32(key, n >> 32, n & 0xFFFFFFFF). Compute n for each element, as two words of 32 bits.
    # Old-style keys are the raw words; new-style keys wrap them.
    key = rng if rng.dtype == jnp.uint32 else jax.random.key_data(rng)
    *leading, last = shape
    strides = [math.prod([*leading[dim + 1 :], math.ceil(last / 2)]) for dim in range(len(leading))]
    high = low = jnp.zeros((1,) * len(block), jnp.uint32)
    indices = [start + jax.lax.broadcasted_iota(jnp.int32, block, dim) for dim, start in enumerate(starts)]
    # The row-major index of an element's word. A mask of [B, H, Q, K] can have more than 2**32 words, hence 64 bits.
    for index, stride in zip(indices[:-1], strides, strict=True):
        high, low = _sum_64((high, low), _product_64(index.astype(jnp.uint32), stride))
    high, low = _sum_64((high, low), (jnp.zeros_like(low), (indices[-1] // 2).astype(jnp.uint32)))
    words = functools.reduce(
        jnp.bitwise_xor, jax.extend.random.threefry2x32_p.bind(key[0], key[1], *jnp.broadcast_arrays(high, low))
    )
    # Even elements use the lower half of a word, odd ones the upper half.
    halves = (words >> (16 * (indices[-1] % 2)).astype(jnp.uint32)) & 0xFFFF
    return halves < threshold


def _sum_64(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """Return the sum of two numbers of 64 bits, each given as (high, low) words."""
    # uint32 wraps around: the sum is below an operand exactly if there is a carry.
    low = a[1] + b[1]
    return a[0] + b[0] + (low < a[1]).astype(jnp.uint32), low


def _product_64(a: Array, factor: int) -> tuple[Array, Array]:
    """Return a * factor modulo 2**64 as (high, low) words, from products of halves of 16 bits."""
    factor_high, factor_low = divmod(factor, 2**32)
    a1, a0, f1, f0 = a >> 16, a & 0xFFFF, jnp.uint32(factor_low >> 16), jnp.uint32(factor_low & 0xFFFF)
    zero = jnp.zeros_like(a)
    # (a1 2**16 + a0) (f1 2**16 + f0) = a1 f1 2**32 + (a0 f1 + a1 f0) 2**16 + a0 f0; what exceeds 64 bits is dropped.
    total = (a1 * f1 + a * jnp.uint32(factor_high), a0 * f0)
    for part in (a0 * f1, a1 * f0):
        total = _sum_64(total, (part >> 16, part << 16))
    return total[0] + zero, total[1]
