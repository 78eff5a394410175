"""Attention mask specifications and their dense materialization."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from t5x_like.kernels.position_bias import RelativeBias, dense_bias, positions_or_indices

SplitForm = Literal["ring", "all_gather"]
"""Communication pattern of attention over a sequence that is split over devices.

ring: Keys and values are passed from device to device.
all_gather: Each device gathers all of them.
"""


class SequenceSplit(NamedTuple):
    """Split of a sequence over `devices` devices."""

    form: SplitForm
    devices: int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q_positions", "kv_positions", "q_segment_ids", "kv_segment_ids", "q_prefix", "kv_prefix"],
    meta_fields=["causal", "window", "padding_at_end"],
)
@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """Description of an attention mask: a query attends to a key if every given condition holds.

    Attributes:
      causal: A query attends to keys at its own position and before it.
      window: (left, right): largest distance of a visible key to the left and to the right.
      q_positions: int32 [B, Q]; None counts indices from 0. Packed rows do not need positions: within a segment the
        difference of indices equals the difference of positions.
      kv_positions: int32 [B, K]; None counts indices from 0.
      q_segment_ids: int32 [B, Q]. With segment ids on both sides, a query attends to keys of its own id, so padding (0)
        attends to padding. A query without any visible key gets the mean of all values, which must be ignored.
      kv_segment_ids: int32 [B, K]. Without `q_segment_ids`, keys of id 0 are hidden.
      q_prefix: bool [B, Q]. Where query and key are both in the prefix, `causal` does not apply (seqio's
        `decoder_causal_attention`).
      kv_prefix: bool [B, K].
      padding_at_end: In each row of `kv_segment_ids` all ids of 0 follow the others, as batches with seqio's features
        have them. A backend may then read lengths; the mask does not change.
    """

    causal: bool = False
    window: tuple[int, int] | None = None
    q_positions: Array | None = None
    kv_positions: Array | None = None
    q_segment_ids: Array | None = None
    kv_segment_ids: Array | None = None
    q_prefix: Array | None = None
    kv_prefix: Array | None = None
    padding_at_end: bool = False

    @property
    def has_prefix(self) -> bool:
        """Whether the causal mask has a bidirectional prefix."""
        return self.causal and self.q_prefix is not None and self.kv_prefix is not None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["bias", "mask"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DenseMask:
    """Materialized mask and bias.

    Attributes:
      bias: float [1 or B, H, Q, K], added to the scores, or None.
      mask: bool [1 or B, 1, 1 or Q, K], True where a query attends to a key, or None if every key is visible.
    """

    bias: Array | None
    mask: Array | None


@dataclasses.dataclass(frozen=True)
class SequenceSharding:
    """Placement of the arrays of an attention that runs under `shard_map`.

    Queries and keys are split over the same mesh axes.

    Attributes:
      mesh: Device mesh.
      batch: Mesh axes of the batch dimension, outermost first; empty if it is not split.
      length: Mesh axes of queries and keys; empty if each device has whole sequences, for backends whose kernels XLA
        does not partition (`AttentionBackend.needs_placement`).
      heads: Mesh axes of the query heads.
      kv_heads: Mesh axes of the key and value heads.
      form: How the queries of a device meet the keys of the others, if there are axes of the length.
    """

    mesh: Mesh
    batch: tuple[str, ...]
    length: tuple[str, ...]
    heads: tuple[str, ...]
    kv_heads: tuple[str, ...]
    form: SplitForm = "ring"

    @property
    def length_split(self) -> SequenceSplit | None:
        """The split of the sequence, or None."""
        if not self.length:
            return None
        return SequenceSplit(self.form, math.prod(self.mesh.shape[axis] for axis in self.length))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["mask", "relative_bias", "dynamic_window"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class KeySpec:
    """Description of the mask and bias of one sequence of keys.

    Attributes:
      mask: Visibility of the keys.
      relative_bias: T5's bias, or None.
      dynamic_window: int32 [2], (left, right) window that is an array because layers of different windows run in one
        `lax.scan`; None where `mask.window` holds.
    """

    mask: MaskSpec
    relative_bias: RelativeBias | None
    dynamic_window: Array | None = None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["keys"], meta_fields=["split"])
@dataclasses.dataclass(frozen=True)
class BlockwiseMask:
    """Mask and bias that are not materialized: a backend masks each block of scores where it computes it.

    Attributes:
      keys: One description per sequence of keys; most attentions have one.
      split: Placement of queries and keys for `shard_map`, or None.
    """

    keys: tuple[KeySpec, ...]
    split: SequenceSharding | None = None

    @classmethod
    def of(
        cls, mask: MaskSpec, relative_bias: RelativeBias | None, split: SequenceSharding | None = None
    ) -> BlockwiseMask:
        """Return the mask of one sequence of keys."""
        return cls((KeySpec(mask, relative_bias),), split)


Mask = DenseMask | BlockwiseMask
"""Mask that an attention backend has prepared; layers that share it prepare it once."""
UNBOUNDED = 2**30
"""Size of a window that hides nothing."""


def reaches(
    q_start: Any, q_length: int, kv_start: Any, kv_length: int, *, causal: bool, window: tuple[Any, Any] | None
) -> Array | bool:
    """Return whether the causal limit and the window leave some pair of these queries and keys visible."""
    q_last, kv_last, conditions = q_start + q_length - 1, kv_start + kv_length - 1, []
    if causal:
        conditions.append(kv_start <= q_last)
    if window is not None:
        conditions.append((kv_last >= q_start - window[0]) & (kv_start <= q_last + window[1]))
    return functools.reduce(jnp.logical_and, conditions) if conditions else True


def dense_mask(mask: MaskSpec, q_length: int, kv_length: int) -> Array | None:
    """Return the mask as bool [1 or B, 1, 1 or Q, K], True where visible; None if every key is visible."""
    q_1or_BxQ, kv_1or_BxK = positions_or_indices(q_length, kv_length, mask.q_positions, mask.kv_positions)
    # Without positions this is one [1, Q, K] array for all rows; conditions get a batch dimension only if they differ
    # by row.
    distance = q_1or_BxQ[:, :, None] - kv_1or_BxK[:, None, :]
    conditions = []
    if mask.causal:
        visible = distance >= 0
        # Both query and key must be in the prefix: inputs do not attend to targets, which come after them.
        if mask.q_prefix is not None and mask.kv_prefix is not None:
            visible = visible | (mask.q_prefix[:, :, None] & mask.kv_prefix[:, None, :])
        conditions.append(visible)
    if mask.window is not None:
        left, right = mask.window
        # Distances are query minus key: positive to the left.
        conditions.append((distance <= left) & (distance >= -right))
    if mask.kv_segment_ids is not None:
        kv_ids = mask.kv_segment_ids[:, None, :]
        # Padding alone needs no query axis: [B, 1, K] instead of [B, Q, K].
        conditions.append(kv_ids != 0 if mask.q_segment_ids is None else mask.q_segment_ids[:, :, None] == kv_ids)
    # Conditions are [1 or B, 1 or Q, K]; the product gets an axis for heads.
    # None spares a backend the `where` over all scores.
    return functools.reduce(jnp.logical_and, conditions)[:, None] if conditions else None


def materialize(mask: MaskSpec, relative_bias: RelativeBias | None, q_length: int, kv_length: int) -> DenseMask:
    """Return the dense mask and bias of a description."""
    return DenseMask(
        bias=None if relative_bias is None else _dense_bias(mask, relative_bias, q_length, kv_length),
        mask=dense_mask(mask, q_length, kv_length),
    )


def _dense_bias(mask: MaskSpec, relative_bias: RelativeBias, q_length: int, kv_length: int) -> Array:
    return dense_bias(relative_bias, q_length, kv_length, q_positions=mask.q_positions, kv_positions=mask.kv_positions)


def dense_mask_and_bias(mask: Mask, q_length: int, kv_lengths: Sequence[int]) -> DenseMask:
    """Return the dense form of a mask over sequences of keys of `kv_lengths`."""
    if isinstance(mask, DenseMask):
        return mask
    parts = []
    for keys, length in zip(mask.keys, kv_lengths, strict=True):
        spec = keys.mask
        if keys.dynamic_window is not None:
            window: Any = (keys.dynamic_window[0], keys.dynamic_window[1])
            spec = dataclasses.replace(spec, window=window)
        parts.append((materialize(spec, keys.relative_bias, q_length, length), length))
    joined, total = parts[0]
    for part, length in parts[1:]:
        joined = concat_masks(joined, total, part, length)  # type: ignore[assignment]
        total += length
    return joined


def concat_masks(first: Mask, first_length: int, second: Mask, second_length: int) -> Mask:
    """Return the mask of two sequences of keys, one after the other."""
    if isinstance(first, BlockwiseMask) and isinstance(second, BlockwiseMask):
        return BlockwiseMask(first.keys + second.keys, first.split)
    assert isinstance(first, DenseMask) and isinstance(second, DenseMask)
    masks = [
        jnp.ones((1, 1, 1, length), jnp.bool_) if dense.mask is None else dense.mask
        for dense, length in ((first, first_length), (second, second_length))
    ]
    # Either mask may be without batch or query axis: broadcast both before they are joined along the keys.
    batch, queries = (max(mask.shape[axis] for mask in masks) for axis in (0, 2))
    return DenseMask(
        bias=_concat_biases((first.bias, first_length), (second.bias, second_length)),
        mask=jnp.concatenate([jnp.broadcast_to(mask, (batch, 1, queries, mask.shape[3])) for mask in masks], axis=3),
    )


def _concat_biases(*biases: tuple[Array | None, int]) -> Array | None:
    """Return the biases of several sequences of keys, given with their lengths, one after the other; None is 0."""
    given = [bias for bias, _ in biases if bias is not None]
    if not given:
        return None
    shape = jnp.broadcast_shapes(*(bias.shape[:3] for bias in given))
    parts = [
        jnp.zeros((*shape, length), given[0].dtype) if bias is None else jnp.broadcast_to(bias, (*shape, length))
        for bias, length in biases
    ]
    return jnp.concatenate(parts, axis=3)


def stack_masks(masks: Sequence[Mask], q_length: int, kv_length: int) -> Array:
    """Return the part in which the masks of several kinds of layers differ, as one array for `select_mask`.

    Args:
      masks: One mask per kind; kinds differ in their window alone.
      q_length: Number of queries.
      kv_length: Number of keys of all sequences together.

    Returns:
      bool [kinds, 1 or B, 1, Q, K] for dense masks, or the windows int32 [kinds, 2] for blockwise ones.
    """
    windows = [mask.keys[0].mask.window or (UNBOUNDED, UNBOUNDED) for mask in masks if isinstance(mask, BlockwiseMask)]
    if windows:
        return jnp.array(windows, jnp.int32)
    # A layer without a window may have no mask or one without a query axis. All are broadcast to one shape, so that a
    # scan over layers can index them.
    all_visible = jnp.ones((1, 1, q_length, kv_length), jnp.bool_)
    dense = [all_visible if mask.mask is None else mask.mask for mask in masks if isinstance(mask, DenseMask)]
    return jnp.stack(jnp.broadcast_arrays(*dense, all_visible)[:-1])


def select_mask(shared: Mask, part: Array) -> Mask:
    """Return the mask of one kind of layer.

    Args:
      shared: Mask of any kind.
      part: The kind's entry of `stack_masks`.
    """
    if isinstance(shared, DenseMask):
        return DenseMask(shared.bias, part)
    # The static window is removed, because the array now decides; the encoder's keys of merged attention have no
    # window.
    first = shared.keys[0]
    first = dataclasses.replace(first, mask=dataclasses.replace(first.mask, window=None), dynamic_window=part)
    return BlockwiseMask((first, *shared.keys[1:]), shared.split)


def add_bias(shared: Mask, spec: MaskSpec, relative_bias: RelativeBias, q_length: int, kv_length: int) -> Mask:
    """Return a shared mask with the relative bias of one layer; `spec` describes the shared mask."""
    if isinstance(shared, DenseMask):
        return DenseMask(_dense_bias(spec, relative_bias, q_length, kv_length), shared.mask)
    # Only the stack's own keys have distances; keys of the encoder, which follow in merged attention, have none.
    first = dataclasses.replace(shared.keys[0], relative_bias=relative_bias)
    return BlockwiseMask((first, *shared.keys[1:]), shared.split)
