"""Arrays in bfloat16 that are updated in float32: the results are rounded stochastically, so that no change is lost.

An update is often smaller than the distance of two numbers of bfloat16, 2**-8 of the value. Rounded to the nearest
number it would be lost in each step; rounded stochastically it is kept on average.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from t5x_like.utils.type_aliases import PyTree


def widened(tree: PyTree) -> PyTree:
    """Return the tree with its bfloat16 arrays in float32, which changes no value."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def rounded_like(new: PyTree, old: PyTree, key: jax.Array) -> PyTree:
    """Return `new` with the types of `old`: float32 arrays in place of bfloat16 ones are rounded stochastically.

    Args:
      new: Tree of arrays.
      old: Tree of the same structure.
      key: Key of the random numbers. Each array has its own, by its place in the tree, and the numbers do not depend on
        how the array is sharded.
    """
    leaves, tree = jax.tree.flatten(new)
    pairs = enumerate(zip(leaves, jax.tree.leaves(old), strict=True))
    return jax.tree.unflatten(
        tree,
        [
            leaf if leaf.dtype == before.dtype else stochastically_rounded(leaf, jax.random.fold_in(key, index))
            for index, (leaf, before) in pairs
        ],
    )


def stochastically_rounded(x: jax.Array, key: jax.Array) -> jax.Array:
    """Return x in bfloat16: one of the two neighbouring numbers, with probabilities that make the mean x.

    Args:
      x: float32, finite.
      key: Key of the random numbers.
    """
    # bfloat16 is the upper half of a float32. A random number below 2**16, added to the lower half, carries into the
    # upper one with the probability of rounding away from 0.
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    upper = jax.lax.shift_right_logical(bits, jnp.uint32(16)).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
