"""Kernels of attention on a mesh: XLA cannot partition them, so each device runs them on its own rows and heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from t5x_like.kernels.attention_masks import SequenceSharding

Axes = tuple[str, ...] | None


def attend_on_each_device(
    attend: Callable[..., Array],
    placement: SequenceSharding | None,
    q_BxHxQxh: Array,
    k_BxGxKxh: Array,
    v_BxGxKxh: Array,
    others: tuple[Any, ...],
    specs: Callable[[Axes, Axes], tuple[Any, ...]],
) -> Array:
    """Return `attend(q, k, v, *others)`, run on the rows and heads of each device.

    Args:
      attend: Returns [B, H, Q, h].
      placement: Placement of rows and heads; None: one device.
      q_BxHxQxh: Queries.
      k_BxGxKxh: Keys.
      v_BxGxKxh: Values.
      others: Further arguments, arrays or trees of them.
      specs: Returns the partition specifications of `others` for the mesh axes of the rows and of the query heads.
    """
    if placement is None:
        return attend(q_BxHxQxh, k_BxGxKxh, v_BxGxKxh, *others)
    batch, heads, kv_heads = (axes or None for axes in (placement.batch, placement.heads, placement.kv_heads))
    k, v = k_BxGxKxh, v_BxGxKxh
    if heads != kv_heads:
        # Fewer key heads than devices: each query head gets its own copy.
        k, v = (jnp.repeat(x, q_BxHxQxh.shape[1] // k_BxGxKxh.shape[1], axis=1) for x in (k, v))
    by_head = PartitionSpec(batch, heads)
    return jax.shard_map(
        attend,
        mesh=placement.mesh,
        in_specs=(*(by_head,) * 3, *specs(batch, heads)),
        out_specs=by_head,
        check_vma=False,
    )(q_BxHxQxh, k, v, *others)
