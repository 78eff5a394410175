"""Attention over one block of keys at a time: the arithmetic that ring attention and blockwise attention share.

The forward pass adds one block of keys after the other to running sums, which are rescaled when a larger score appears
(Milakov & Gimelshein 2018, Online normalizer calculation for softmax). The backward pass computes the scores of a block
again from the statistics of the forward pass (Dao et al. 2022, FlashAttention).

Shape letters are sizes of one block: b rows, g key heads, r query heads per key head, q queries, k keys, x head width.
Heads come before queries and keys, so that each product is a batch of plain matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

HIDDEN = float(jnp.finfo(jnp.float32).min)
"""Score of a hidden key: finite, so that a query without visible keys gets a mean of values instead of NaN."""


class Sums(NamedTuple):
    """Running sums of some queries over the keys so far, in float32.

    Attributes:
      out: [b, g, r, q, x], sum of exp(score - maximum) * value.
      maximum: [b, g, r, q], the largest score.
      total: [b, g, r, q], sum of exp(score - maximum).
    """

    out: Array
    maximum: Array
    total: Array

    @classmethod
    def zeros_like(cls, q: Array) -> Sums:
        """Return the sums before the first block of keys, for queries [b, g, r, q, x]."""
        # exp(-inf - new) is 0, so the first block replaces these.
        return cls(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], -jnp.inf), jnp.zeros(q.shape[:-1]))

    def plus(self, other: Sums) -> Sums:
        """Return the sums over the keys of both."""
        maximum = jnp.maximum(self.maximum, other.maximum)
        mine, others = jnp.exp(self.maximum - maximum), jnp.exp(other.maximum - maximum)
        out = self.out * mine[..., None] + other.out * others[..., None]
        return Sums(out, maximum, self.total * mine + other.total * others)

    def mean(self) -> Array:
        """Return the mean of the values by the softmax of the scores, [b, g, r, q, x]."""
        return self.out / self.total[..., None]


class Scores(NamedTuple):
    """Scores of one block.

    Attributes:
      values: float32 [b, g, r, q, k]; `HIDDEN` where the mask hides the key.
      slope: Derivative of the scores by the products of queries and keys, of the same shape; None where it is 1.
    """

    values: Array
    slope: Array | None


class Gradients(NamedTuple):
    """Contribution of one block to the gradients, in float32.

    Attributes:
      q: [b, g, r, q, x].
      k: [b, g, k, x].
      v: [b, g, k, x].
      scores: [b, g, r, q, k], gradient of the scores after soft cap and bias, and so of the bias.
    """

    q: Array
    k: Array
    v: Array
    scores: Array


def block_scores(q: Array, k: Array, *, softcap: float | None, bias: Array | None, visible: Array | None) -> Scores:
    """Return the scores of queries [b, g, r, q, x] with keys [b, g, k, x].

    Args:
      q: Scaled queries.
      k: Keys.
      softcap: Scores s become softcap * tanh(s / softcap) before bias and mask; None: no soft cap.
      bias: [1 or b, g * r, q, k], or None.
      visible: bool, broadcasts to [b, g, r, q, k]; None: every key is visible.
    """
    scores = _products_with_keys(q, k)
    slope = None
    if softcap is not None:
        tanh = jnp.tanh(scores / softcap)
        scores, slope = softcap * tanh, 1.0 - jnp.square(tanh)
    if bias is not None:
        scores = scores + bias.reshape(bias.shape[0], *scores.shape[1:3], *bias.shape[2:])
    if visible is not None:
        scores = jnp.where(visible, scores, HIDDEN)
    return Scores(scores, slope)


def add_block(sums: Sums, scores: Scores, v: Array, *, keep: Array | None, dropout_rate: float) -> Sums:
    """Return the sums with one more block of values [b, g, k, x].

    Args:
      sums: Sums so far.
      scores: Result of `block_scores`.
      v: Values; the weights are rounded to their type before the product.
      keep: Dropout mask that broadcasts to the scores, True where a probability is kept; None: no dropout.
      dropout_rate: Rate of `keep`.
    """
    # Sums so far are relative to the old maximum; `decay` makes them relative to the new one.
    new = jnp.maximum(sums.maximum, jnp.max(scores.values, axis=-1))
    weights, decay = jnp.exp(scores.values - new[..., None]), jnp.exp(sums.maximum - new)
    total = sums.total * decay + jnp.sum(weights, axis=-1)
    # After `total`: dropout acts on probabilities, whose normalizer counts the dropped keys as well.
    if keep is not None:
        weights = jnp.where(keep, weights / (1.0 - dropout_rate), 0.0)
    added = _sum_over_keys(weights.astype(v.dtype), v)
    return Sums(sums.out * decay[..., None] + added, new, total)


def correction(out: Array, d_out: Array) -> Array:
    """Return sum_k p dp of each query, the correction term of the softmax's gradient, float32 [b, g, r, q].

    With out = sum_k p v and dp = d_out v it equals out . d_out, so that no second pass over the keys is needed (Dao et
    al. 2022, appendix B). Dropout is in `out` already.
    """
    return jnp.einsum("...x,...x->...", out, d_out, preferred_element_type=jnp.float32)


def block_gradients(
    q: Array,
    k: Array,
    v: Array,
    d_out: Array,
    scores: Scores,
    statistics: tuple[Array, Array, Array],
    *,
    visible: Array | None,
    keep: Array | None,
    dropout_rate: float,
) -> Gradients:
    """Return what one block adds to the gradients.

    Args:
      q: Scaled queries [b, g, r, q, x].
      k: Keys [b, g, k, x].
      v: Values [b, g, k, x].
      d_out: Cotangent of the output, [b, g, r, q, x].
      scores: Result of `block_scores`.
      statistics: Maximum and total of the sums over all blocks, and `correction`, [b, g, r, q] each.
      visible: The mask of `block_scores`.
      keep: Dropout mask of the forward pass.
      dropout_rate: Rate of `keep`.
    """
    maximum, total, delta = (x[..., None] for x in statistics)
    weights = jnp.exp(scores.values - maximum) * (1.0 / total)
    d_weights = _products_with_keys(d_out, v)
    kept = weights
    if keep is not None:
        kept, d_weights = (jnp.where(keep, x / (1.0 - dropout_rate), 0.0) for x in (weights, d_weights))
    # Gradient of the softmax: p (dp - sum_k p dp).
    d_scores = weights * (d_weights - delta)
    if visible is not None:
        # Hidden scores are a constant. A query without visible keys has equal weights and would otherwise pass a
        # gradient.
        d_scores = jnp.where(visible, d_scores, 0.0)
    # Bias is added after the soft cap, so only the products get its slope.
    d_products = (d_scores if scores.slope is None else d_scores * scores.slope).astype(q.dtype)
    return Gradients(
        _sum_over_keys(d_products, k),
        _sum_over_queries(d_products, q),
        _sum_over_queries(kept.astype(q.dtype), d_out),
        d_scores,
    )


# The heads of a group and their queries are one dimension of the products: XLA would copy a result with two.
def _products_with_keys(q: Array, k: Array) -> Array:
    """Return the products of queries [b, g, r, q, x] with keys [b, g, k, x], float32 [b, g, r, q, k]."""
    products = jnp.einsum("bgqx,bgkx->bgqk", _joined(q), k, preferred_element_type=jnp.float32)
    return products.reshape(*q.shape[:4], k.shape[2])


def _sum_over_keys(weights: Array, v: Array) -> Array:
    """Return the sum of values [b, g, k, x] by weights [b, g, r, q, k], float32 [b, g, r, q, x]."""
    total = jnp.einsum("bgqk,bgkx->bgqx", _joined(weights), v, preferred_element_type=jnp.float32)
    return total.reshape(*weights.shape[:4], v.shape[3])


def _sum_over_queries(weights: Array, x: Array) -> Array:
    """Return the sum of [b, g, r, q, x] by weights [b, g, r, q, k], float32 [b, g, k, x]."""
    # With the factors the other way round, products on CPUs transpose the weights, and take twice as long.
    total = jnp.einsum("bgqx,bgqk->bgxk", _joined(x), _joined(weights), preferred_element_type=jnp.float32)
    return jnp.swapaxes(total, 2, 3)


def _joined(x: Array) -> Array:
    """Return [b, g, r, q, ...] as [b, g, r * q, ...]."""
    return x.reshape(*x.shape[:2], -1, x.shape[4])


def pad_to_blocks(x: Array, axis: int, block: int, value: float = 0) -> Array:
    """Return `x` with `value` at the end of an axis up to a multiple of `block`."""
    missing = -x.shape[axis] % block
    widths = [(0, missing if dim == axis else 0) for dim in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if missing else x


def slice_block(x: Array, start: Array | int, size: int) -> Array:
    """Return a block of the next to last axis."""
    return x if size == x.shape[-2] else jax.lax.dynamic_slice_in_dim(x, start, size, axis=x.ndim - 2)


def add_to_block(x: Array, block: Array, start: Array | int) -> Array:
    """Return `x` with a block added to its part from `start` on along the next to last axis."""
    if block.shape == x.shape:
        return x + block
    added = slice_block(x, start, block.shape[-2]) + block
    return jax.lax.dynamic_update_slice_in_dim(x, added, start, axis=x.ndim - 2)


def loop_over_blocks(low: Array | int, high: Array | int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Run `body` for each block; without a loop if there is one block, as for short rows."""
    if isinstance(low, int) and isinstance(high, int) and high - low == 1:
        return body(low, carry)
    # Not `fori_loop`, which is a scan if the limits are static: of a scan within a scan over layers, JAX computes what
    # does not depend on the layer, the bias, once for all blocks and keeps it.
    return jax.lax.while_loop(
        lambda state: state[0] < high,
        lambda state: (state[0] + 1, body(*state)),
        (jnp.asarray(low, jnp.int32), carry),
    )[1]
