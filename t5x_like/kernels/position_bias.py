"""Relative positions: T5's bias from its table, and the buckets of DeBERTa's disentangled attention."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=["bidirectional", "max_distance"]
)
@dataclasses.dataclass(frozen=True)
class RelativeBias:
    """T5's relative position bias: one learned number per head and bucket of (key position - query position).

    Attributes:
      table: float [num_buckets, H].
      bidirectional: Half of the buckets are for keys to the right; otherwise those share the bucket of distance 0.
      max_distance: All distances from this one on share the last bucket.
    """

    table: Array
    bidirectional: bool
    max_distance: int


def positions_or_indices(
    q_length: int, kv_length: int, q_positions: Array | None, kv_positions: Array | None
) -> tuple[Array, Array]:
    """Return the positions of queries [1 or B, Q] and keys [1 or B, K]; without positions these are the indices."""
    q = jnp.arange(q_length)[None] if q_positions is None else q_positions
    kv = jnp.arange(kv_length)[None] if kv_positions is None else kv_positions
    return q, kv


def relative_position_buckets(
    relative_position: Array, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Array:
    """Return the bucket of each (key position - query position), int32 of the same shape.

    As in T5 (Raffel et al. 2020, `mesh_tensorflow`'s `_relative_position_bucket`): the first half of the buckets holds
    one distance each, the rest grows logarithmically up to `max_distance`.
    """
    # T5 counts the distance from the key to the query, positive for keys to the left.
    n = -relative_position
    offset: Array | int = 0
    if bidirectional:
        # Keys to the right (n < 0) use the upper half of the buckets.
        num_buckets //= 2
        offset = (n < 0).astype(jnp.int32) * num_buckets
        n = jnp.abs(n)
    else:
        # Keys to the right share bucket 0; in a causal decoder the mask hides them.
        n = jnp.maximum(n, 0)
    exact = num_buckets // 2
    # jnp.maximum keeps log(0) out; distance 0 takes the exact branch of the `where` below.
    log_ratio = jnp.log(jnp.maximum(n, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    # The conversion truncates, as in Mesh TensorFlow. Rounding would move the boundaries of the buckets and break
    # imported checkpoints.
    logarithmic = exact + (log_ratio * (num_buckets - exact)).astype(jnp.int32)
    return offset + jnp.where(n < exact, n, jnp.minimum(logarithmic, num_buckets - 1))


def bias_by_distance(relative_bias: RelativeBias, relative_position: Array) -> Array:
    """Return T5's bias of each (key position - query position), [..., H]."""
    buckets = relative_position_buckets(
        relative_position,
        bidirectional=relative_bias.bidirectional,
        num_buckets=relative_bias.table.shape[0],
        max_distance=relative_bias.max_distance,
    )
    return jnp.take(relative_bias.table, buckets, axis=0)


def dense_bias(
    relative_bias: RelativeBias,
    q_length: int,
    kv_length: int,
    *,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
    offset: Array | int = 0,
) -> Array:
    """Return T5's bias as an array [1 or B, H, Q, K].

    Args:
      relative_bias: Table and bucket layout.
      q_length: Number of queries.
      kv_length: Number of keys.
      q_positions: [1 or B, Q]; None counts indices.
      kv_positions: [1 or B, K]; None counts indices.
      offset: Index of the first key minus index of the first query; used only without positions.
    """
    lookup = functools.partial(bias_by_distance, relative_bias)
    if q_positions is None and kv_positions is None:
        # The bias is constant along diagonals. Look up each distance once, as a row of distances 0 .. K-1, -Q .. -1 of
        # length P = Q + K. Repeating the row and reading the result in rows of length P - 1 shifts each row by one to
        # the right, which is the Toeplitz matrix. Its gradient is a pad and a sum; the gradient of a lookup of [Q, K]
        # would be a slow scatter.
        period = q_length + kv_length
        indices = jnp.arange(period)
        row_PxH = lookup(jnp.where(indices < kv_length, indices, indices - period) + offset)
        repeated = jnp.tile(row_PxH.T, (1, q_length))[:, : q_length * (period - 1)]
        return repeated.reshape(-1, q_length, period - 1)[None, :, :, :kv_length]
    q_1or_BxQ, kv_1or_BxK = positions_or_indices(q_length, kv_length, q_positions, kv_positions)
    return jnp.moveaxis(lookup(kv_1or_BxK[:, None, :] - q_1or_BxQ[:, :, None]), -1, 1)


def disentangled_buckets(
    q_length: int,
    kv_length: int,
    *,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
    buckets: int,
    max_distance: int,
) -> Array:
    """Return the row of DeBERTa's distance table for each (query position - key position), int32 [1 or B, Q, K].

    Distances below buckets / 2 have one row each, larger ones up to `max_distance` share rows by logarithm. The table
    has 2 * buckets rows, with distance 0 in the middle (He et al. 2021).

    Args:
      q_length: Number of queries.
      kv_length: Number of keys.
      q_positions: [1 or B, Q]; None counts indices.
      kv_positions: [1 or B, K]; None counts indices.
      buckets: Number of buckets in each direction.
      max_distance: All distances from this one on share the last row.
    """
    q_1or_BxQ, kv_1or_BxK = positions_or_indices(q_length, kv_length, q_positions, kv_positions)
    distance = q_1or_BxQ[:, :, None] - kv_1or_BxK[:, None, :]
    exact = buckets // 2
    far = jnp.maximum(jnp.abs(distance), exact).astype(jnp.float32) / exact
    # DeBERTa's `make_log_bucket_position` takes max_distance - 1 here, so that the largest distance below the limit
    # gets the last bucket.
    log_ratio = jnp.log(far) / jnp.log(jnp.float32((max_distance - 1) / exact))
    # The original rounds up here, unlike T5.
    logarithmic = jnp.ceil(log_ratio * (exact - 1)).astype(jnp.int32) + exact
    bucket = jnp.where(jnp.abs(distance) <= exact, distance, jnp.sign(distance) * logarithmic)
    return jnp.clip(bucket + buckets, 0, 2 * buckets - 1)
