"""Arguments of the kernels of flash attention, from the description of a mask and a bias."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from t5x_like.kernels.attention_masks import KeySpec
from t5x_like.kernels.flash_block import KernelMask, KernelSetting
from t5x_like.kernels.online_softmax import pad_to_blocks
from t5x_like.kernels.position_bias import RelativeBias, relative_position_buckets

_PADDING_CODE = -2
"""Code of keys that are padding of the last block: no query has its segment, -1."""


def kernel_setting(
    keys: KeySpec, block: int, softcap: float | None, *, is_partial: bool, interpret: bool
) -> KernelSetting:
    """Return the static part of a call; arguments as in `KernelSetting`."""
    return KernelSetting(
        block,
        keys.mask.causal,
        keys.mask.has_prefix,
        keys.mask.window if keys.dynamic_window is None else None,
        softcap,
        is_partial,
        interpret,
    )


def kernel_mask(keys: KeySpec, q_length: int, kv_length: int, block: int, offset: Array | None = None) -> KernelMask:
    """Return the arrays of the mask in whole blocks.

    Args:
      keys: Description of the mask.
      q_length: Number of queries without padding.
      kv_length: Number of keys without padding.
      block: Number of queries and of keys of a block.
      offset: Index of the first key minus that of the first query, a number; None: 0.
    """
    mask = keys.mask
    q_codes = kv_codes = None
    if mask.kv_segment_ids is not None or mask.has_prefix or kv_length % block:
        kv_segments = jnp.zeros((1, kv_length), jnp.int32) if mask.kv_segment_ids is None else mask.kv_segment_ids
        q_segments = mask.q_segment_ids
        if mask.kv_segment_ids is None or q_segments is None:
            # Without segments of the queries, keys of segment 0 are hidden: all other keys are in the queries' one.
            q_segments = jnp.zeros((1, q_length), jnp.int32)
            if mask.kv_segment_ids is not None:
                q_segments, kv_segments = q_segments + 1, (jnp.asarray(kv_segments) != 0).astype(jnp.int32)
        q_codes, kv_codes = (2 * jnp.asarray(x, jnp.int32) for x in (q_segments, kv_segments))
        if mask.has_prefix:
            assert mask.q_prefix is not None and mask.kv_prefix is not None
            q_codes, kv_codes = q_codes + jnp.asarray(mask.q_prefix), kv_codes + jnp.asarray(mask.kv_prefix)
        q_codes = pad_to_blocks(q_codes, 1, block)[:, None]
        kv_codes = pad_to_blocks(kv_codes, 1, block, _PADDING_CODE)[:, None]
    return KernelMask(
        q_codes, kv_codes, keys.dynamic_window, None if offset is None else jnp.asarray(offset, jnp.int32).reshape(1)
    )


def bias_distances(bias: RelativeBias, q_length: int, kv_length: int, offset: Array | int = 0) -> Array:
    """Return T5's bias as one number per head and distance, float32 [H, Q + K].

    Args:
      bias: The bias.
      q_length: Number Q of queries, in whole blocks. Entry i belongs to distance i - Q + offset.
      kv_length: Number K of keys, in whole blocks.
      offset: Index of the first key minus that of the first query.
    """
    buckets_P = relative_position_buckets(
        jnp.arange(q_length + kv_length) - q_length + offset,
        bidirectional=bias.bidirectional,
        num_buckets=bias.table.shape[0],
        max_distance=bias.max_distance,
    )
    # The gradient of a product is a sum in a fixed order. That of a lookup is a scatter, for which XLA has atomic
    # additions on GPUs. The product is exact: one factor of each sum is 1, all others are 0.
    one_hot_PxN = jax.nn.one_hot(buckets_P, bias.table.shape[0], dtype=jnp.float32)
    return jnp.einsum("pn,nh->hp", one_hot_PxN, bias.table.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
