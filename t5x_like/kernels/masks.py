"""Who sees whom, described; and the arrays that the materialising backends make of a description."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=["bidirectional", "max_distance"]
)
@dataclasses.dataclass(frozen=True)
class RelativeBias:
    """T5's relative position bias: one learned number per head and bucket of (key position - query position).

    Attributes:
      table: [num_buckets, H].
      bidirectional: Half of the buckets are for keys to the right; otherwise those share the bucket of distance 0.
      max_distance: Distances from here on share the last bucket.
    """

    table: Array
    bidirectional: bool
    max_distance: int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q_positions", "kv_positions", "q_segment_ids", "kv_segment_ids", "q_prefix", "kv_prefix"],
    meta_fields=["causal", "window"],
)
@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """Who sees whom; every condition that is given must hold.

    Attributes:
      causal: A query sees keys at its own position and before.
      window: (left, right): a query sees keys at these distances at most, to the left and to the right.
      q_positions, kv_positions: [B, Q], [B, K]; None counts cells from 0. Packed rows need none: within a segment the
        difference of cells is the difference of positions.
      q_segment_ids, kv_segment_ids: [B, Q], [B, K]. With both, a query sees the keys of its own id, so padding (0) sees
        padding; with keys' ids alone, keys of id 0 are hidden. A query that sees nothing gets the mean of all values:
        a number, to be ignored.
      q_prefix, kv_prefix: bool [B, Q], [B, K]. Where both are set `causal` is lifted (seqio's
        `decoder_causal_attention`).
    """

    causal: bool = False
    window: tuple[int, int] | None = None
    q_positions: Array | None = None
    kv_positions: Array | None = None
    q_segment_ids: Array | None = None
    kv_segment_ids: Array | None = None
    q_prefix: Array | None = None
    kv_prefix: Array | None = None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["bias", "mask"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Prepared:
    """A mask and a bias in the form that the materialising backends use.

    Attributes:
      bias: Float, [1 or B, H, Q, K], or None.
      mask: bool, True where a query sees a key, [1 or B, 1, 1 or Q, K], or None where all see all.
    """

    bias: Array | None
    mask: Array | None


@dataclasses.dataclass(frozen=True)
class Split:
    """How the arrays of an attention over a split sequence lie on a mesh: for each dimension its mesh axes, outermost
    first. Queries and keys are split over the same axes."""

    mesh: Mesh
    batch: tuple[str, ...]
    length: tuple[str, ...]
    heads: tuple[str, ...]
    kv_heads: tuple[str, ...]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["mask", "relative_bias", "reach"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Keys:
    """What is said of the keys of one sequence.

    Attributes:
      mask: Which queries see them.
      relative_bias: T5's bias, or None.
      reach: int32 [2], a window that is not known before the program runs, or None.
    """

    mask: MaskSpec
    relative_bias: RelativeBias | None
    reach: Array | None = None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["keys"], meta_fields=["split"])
@dataclasses.dataclass(frozen=True)
class Described:
    """A mask and a bias that are not materialised: queries and keys are split over devices, and each block of scores
    is masked where it is computed.

    Attributes:
      keys: Of each sequence of keys that the queries see; most attentions have one.
    """

    keys: tuple[Keys, ...]
    split: Split


Mask = Prepared | Described
UNBOUNDED = 2**30
"""Reach of a window that hides nothing."""


def relative_position_buckets(
    relative_position: Array, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Array:
    """Bucket of each (key position - query position), as in T5 (Raffel et al. 2020, `mesh_tensorflow`'s
    `_relative_position_bucket`): the first half of the buckets exact, the rest logarithmic up to `max_distance`."""
    n = -relative_position
    offset: Array | int = 0
    if bidirectional:
        num_buckets //= 2
        offset = (n < 0).astype(jnp.int32) * num_buckets
        n = jnp.abs(n)
    else:
        n = jnp.maximum(n, 0)
    exact = num_buckets // 2
    log_ratio = jnp.log(jnp.maximum(n, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    logarithmic = exact + (log_ratio * (num_buckets - exact)).astype(jnp.int32)
    return offset + jnp.where(n < exact, n, jnp.minimum(logarithmic, num_buckets - 1))


def prepare(
    mask: MaskSpec,
    relative_bias: RelativeBias | None,
    q_length: int,
    kv_length: int,
    split: Split | None = None,
) -> Mask:
    """Materialises a description, but for sequences that are split over devices. Layers that share it call this once
    and hand the result to `attention`."""
    if split is not None:
        return Described((Keys(mask, relative_bias),), split)
    return Prepared(
        bias=None if relative_bias is None else dense_bias(mask, relative_bias, q_length, kv_length),
        mask=dense_mask(mask, q_length, kv_length),
    )


def after_another(first: Mask, first_length: int, second: Mask, second_length: int) -> Mask:
    """The mask of keys of one kind and, after them, of another; without bias."""
    if isinstance(first, Described) and isinstance(second, Described):
        return Described(first.keys + second.keys, first.split)
    assert isinstance(first, Prepared) and isinstance(second, Prepared)
    assert first.bias is None and second.bias is None
    masks = [
        jnp.ones((1, 1, 1, length), jnp.bool_) if prepared.mask is None else prepared.mask
        for prepared, length in ((first, first_length), (second, second_length))
    ]
    rows, queries = (max(mask.shape[axis] for mask in masks) for axis in (0, 2))
    return Prepared(
        bias=None,
        mask=jnp.concatenate([jnp.broadcast_to(mask, (rows, 1, queries, mask.shape[3])) for mask in masks], axis=3),
    )


def masks_together(masks: Sequence[Mask], q_length: int, kv_length: int) -> Array:
    """What differs between the masks of several kinds of layers, for `of_kind`: [kinds, 1 or B, 1, Q, K], or their
    windows [kinds, 2]."""
    described = [each.keys[0].mask.window or (UNBOUNDED, UNBOUNDED) for each in masks if isinstance(each, Described)]
    if described:
        return jnp.array(described, jnp.int32)
    everything = jnp.ones((1, 1, q_length, kv_length), jnp.bool_)
    dense = [everything if each.mask is None else each.mask for each in masks if isinstance(each, Prepared)]
    return jnp.stack(jnp.broadcast_arrays(*dense, everything)[:-1])


def of_kind(shared: Mask, own: Array) -> Mask:
    """The mask of one kind of layer, `own` being its part of `masks_together`."""
    if isinstance(shared, Prepared):
        return Prepared(shared.bias, own)
    first = shared.keys[0]
    first = dataclasses.replace(first, mask=dataclasses.replace(first.mask, window=None), reach=own)
    return Described((first, *shared.keys[1:]), shared.split)


def with_bias(shared: Mask, spec: MaskSpec, relative_bias: RelativeBias, q_length: int, kv_length: int) -> Mask:
    """The mask with a bias that is a layer's own; `spec` is what it was made of."""
    if isinstance(shared, Prepared):
        return Prepared(dense_bias(spec, relative_bias, q_length, kv_length), shared.mask)
    first = dataclasses.replace(shared.keys[0], relative_bias=relative_bias)
    return Described((first, *shared.keys[1:]), shared.split)


def _positions(mask: MaskSpec, q_length: int, kv_length: int) -> tuple[Array, Array]:
    """Positions of queries [1 or B, Q] and keys [1 or B, K]."""
    q = jnp.arange(q_length)[None] if mask.q_positions is None else mask.q_positions
    kv = jnp.arange(kv_length)[None] if mask.kv_positions is None else mask.kv_positions
    return q, kv


def dense_mask(mask: MaskSpec, q_length: int, kv_length: int) -> Array | None:
    """The description as a bool array [1 or B, 1, 1 or Q, K], True where seen; None where all see all."""
    q_1or_BxQ, kv_1or_BxK = _positions(mask, q_length, kv_length)
    distance = q_1or_BxQ[:, :, None] - kv_1or_BxK[:, None, :]
    conditions = []
    if mask.causal:
        seen = distance >= 0
        if mask.q_prefix is not None and mask.kv_prefix is not None:
            seen = seen | (mask.q_prefix[:, :, None] & mask.kv_prefix[:, None, :])
        conditions.append(seen)
    if mask.window is not None:
        left, right = mask.window
        conditions.append((distance <= left) & (distance >= -right))
    if mask.kv_segment_ids is not None:
        kv_ids = mask.kv_segment_ids[:, None, :]
        conditions.append(kv_ids != 0 if mask.q_segment_ids is None else mask.q_segment_ids[:, :, None] == kv_ids)
    return functools.reduce(jnp.logical_and, conditions)[:, None] if conditions else None


def disentangled_buckets(mask: MaskSpec, q_length: int, kv_length: int, *, buckets: int, max_distance: int) -> Array:
    """Rows of DeBERTa's table for each (query position - key position), int32 [1 or B, Q, K] (He et al. 2021).

    Distances below buckets / 2 have a row each, larger ones up to `max_distance` share rows by logarithm; the table has
    2 * buckets rows and distance 0 is in the middle.
    """
    q_1or_BxQ, kv_1or_BxK = _positions(mask, q_length, kv_length)
    distance = q_1or_BxQ[:, :, None] - kv_1or_BxK[:, None, :]
    exact = buckets // 2
    far = jnp.maximum(jnp.abs(distance), exact).astype(jnp.float32) / exact
    log_ratio = jnp.log(far) / jnp.log(jnp.float32((max_distance - 1) / exact))
    logarithmic = jnp.ceil(log_ratio * (exact - 1)).astype(jnp.int32) + exact
    bucket = jnp.where(jnp.abs(distance) <= exact, distance, jnp.sign(distance) * logarithmic)
    return jnp.clip(bucket + buckets, 0, 2 * buckets - 1)


def dense_bias(
    mask: MaskSpec, relative_bias: RelativeBias, q_length: int, kv_length: int, offset: Array | int = 0
) -> Array:
    """T5's bias as an array [1 or B, H, Q, K]; of the mask, the positions are read. Where there are none, `offset` is
    the first key's cell less the first query's."""
    table = relative_bias.table

    def lookup(relative_position: Array) -> Array:
        buckets = relative_position_buckets(
            relative_position,
            bidirectional=relative_bias.bidirectional,
            num_buckets=table.shape[0],
            max_distance=relative_bias.max_distance,
        )
        return jnp.take(table, buckets, axis=0)

    if mask.q_positions is None and mask.kv_positions is None:
        # Constant along diagonals: look up each distance once and lay the row of distances 0 .. K-1, -Q .. -1 out as a
        # Toeplitz matrix by reading its repetition in rows one shorter. The gradient is then a pad and a sum, where
        # that of a lookup of [Q, K] is a slow scatter.
        period = q_length + kv_length
        cells = jnp.arange(period)
        row_PxH = lookup(jnp.where(cells < kv_length, cells, cells - period) + offset)
        repeated = jnp.tile(row_PxH.T, (1, q_length))[:, : q_length * (period - 1)]
        return repeated.reshape(-1, q_length, period - 1)[None, :, :, :kv_length]
    q_1or_BxQ, kv_1or_BxK = _positions(mask, q_length, kv_length)
    return jnp.moveaxis(lookup(kv_1or_BxK[:, None, :] - q_1or_BxQ[:, :, None]), -1, 1)
