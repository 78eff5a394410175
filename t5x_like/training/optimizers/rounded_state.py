"""Optimizer state in bfloat16, rounded stochastically: half the memory of float32, without a bias."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5x_like.utils.type_aliases import PyTree

_SEED = 0xB16
"""Seed of the rounding. Another number would change the states of a run."""


def with_rounded_state(optimizer: Any, *, takes_step: bool) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer that keeps the matrices of its state in bfloat16 and computes in float32.

    An update to a moment is often smaller than the distance of two numbers of bfloat16, 2**-8 of the value. Rounded to
    the nearest number it would be lost in each step; rounded stochastically it is kept on average. `update` takes the
    step as a keyword, from which the random numbers of the rounding follow, so that a resumed run rounds alike.

    Args:
      optimizer: Optimizer whose `update` takes the learning rate as a keyword.
      takes_step: Whether its `update` takes the step as well.
    """

    def init(params: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if is_rounded(x) else x, optimizer.init(params))

    def update(
        grads: PyTree, state: PyTree, params: PyTree | None = None, *, step: jax.Array, **arguments: Any
    ) -> tuple[PyTree, PyTree]:
        if takes_step:
            arguments["step"] = step
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, state)
        updates, new = optimizer.update(grads, wide, params, **arguments)
        leaves, tree = jax.tree.flatten(new)
        key = jax.random.fold_in(jax.random.key(_SEED), step)
        rounded = [
            stochastically_rounded(leaf, jax.random.fold_in(key, index)) if is_rounded(leaf) else leaf
            for index, leaf in enumerate(leaves)
        ]
        return updates, jax.tree.unflatten(tree, rounded)

    return optax.GradientTransformationExtraArgs(init, update)


def is_rounded(x: jax.Array) -> bool:
    """Return whether an array of the state is kept in bfloat16: counts and vectors are not, which take no memory."""
    return x.ndim >= 2 and x.dtype == jnp.float32


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
