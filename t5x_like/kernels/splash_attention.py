"""Splash attention: JAX's block-sparse Pallas kernels for TPUs, for attention without a bias.

The causal limit and the window are a static mask, from which the kernels know which blocks to skip. Segments and
padding are segment ids. A query without any visible key gets a mean of values, which must be ignored.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec

from t5x_like.kernels.attention_backend import AttentionBackend, AttentionOptions, AttentionRequest, usual_refusal
from t5x_like.kernels.attention_masks import BlockwiseMask, Mask, MaskSpec, SequenceSharding
from t5x_like.kernels.device_kernels import Axes, attend_on_each_device
from t5x_like.kernels.flash_tpu_kernels import block_size
from t5x_like.kernels.online_softmax import pad_to_blocks
from t5x_like.kernels.position_bias import RelativeBias

_Q_PADDING, _KV_PADDING = -2, -1
"""Segment ids of queries and keys that are padding of the last block: they are in no segment of a row."""


class SplashAttention(AttentionBackend):
    """`jax.experimental.pallas.ops.tpu.splash_attention`, forward and backward.

    Attributes:
      block: Number of queries and of keys of a block, a multiple of 128; None: 512, or less for less padding.
      interpret: Run the kernels as ordinary operations on any platform, for tests. Otherwise compilation for another
        platform than TPU fails.
    """

    platform = "tpu"
    recomputes_scores = True
    needs_placement = True

    def __init__(self, *, block: int | None = None, interpret: bool = False) -> None:
        self.block, self.interpret = block, interpret

    def supports(self, request: AttentionRequest) -> str | None:
        if request.bias == "relative":
            return 'it has no relative bias; set attention="flash"'
        if request.is_merged:
            return 'it cannot attend to several sequences of keys (merged attention); set attention="blockwise"'
        if request.has_positions:
            return 'it masks by index and found explicit positions; set attention="blockwise"'
        if request.has_prefix:
            return 'its mask is static, and a prefix differs between rows; set attention="flash"'
        if request.dynamic_window:
            return 'its mask is static, and layers of several windows run in one scan; set attention="flash"'
        if request.split is not None:
            return 'its mask is that of a whole sequence, and devices split the sequence; set attention="flash"'
        return usual_refusal(request, "blockwise")

    def prepare_mask(
        self,
        mask: MaskSpec,
        relative_bias: RelativeBias | None,
        q_length: int,
        kv_length: int,
        split: SequenceSharding | None,
    ) -> Mask:
        return BlockwiseMask.of(mask, relative_bias, split)

    def attend(
        self, q_BxQxHxh: Array, keys: Sequence[Array], values: Sequence[Array], mask: Mask, options: AttentionOptions
    ) -> Array:
        if not isinstance(mask, BlockwiseMask):
            raise ValueError("found a dense mask, expected the result of this backend's prepare_mask")
        described = mask.keys[0].mask
        q_length, kv_length = q_BxQxHxh.shape[1], keys[0].shape[1]
        if described.window is not None and q_length != kv_length:
            # A block of queries beyond the last window has no block of keys, for which the kernels divide by zero.
            raise ValueError(
                f"found a window over {q_length} queries and {kv_length} keys, expected as many keys as queries; "
                'set attention="flash"'
            )
        block = self.block or block_size(q_length, kv_length)
        q = q_BxQxHxh * options.scale if options.scale != 1.0 else q_BxQxHxh
        q, k, v = (pad_to_blocks(jnp.swapaxes(x, 1, 2), 2, block) for x in (q, keys[0], values[0]))
        segments = _segment_ids(described, q.shape[0], q_length, kv_length, block)
        attend = functools.partial(_attend, described.causal, described.window, block, options.softcap, self.interpret)

        def specs(batch: Axes, heads: Axes) -> tuple[Any, ...]:
            return (PartitionSpec(batch),)

        out = attend_on_each_device(attend, mask.split, q, k, v, (segments,), specs)
        return jnp.swapaxes(out[:, :, :q_length], 1, 2)


def _segment_ids(
    mask: MaskSpec, rows: int, q_length: int, kv_length: int, block: int
) -> splash_attention_kernel.SegmentIds | None:
    """Return segment ids [B, Q] and [B, K] in whole blocks; None if every key is of the queries' segment."""
    if mask.kv_segment_ids is None and kv_length % block == 0:
        return None
    if mask.kv_segment_ids is None:
        q_ids, kv_ids = jnp.zeros((1, q_length), jnp.int32), jnp.zeros((1, kv_length), jnp.int32)
    elif mask.q_segment_ids is None:
        # Keys of segment 0 are hidden: all other keys are in the one segment of the queries.
        q_ids = jnp.ones((1, q_length), jnp.int32)
        kv_ids = (jnp.asarray(mask.kv_segment_ids) != 0).astype(jnp.int32)
    else:
        q_ids, kv_ids = (jnp.asarray(x, jnp.int32) for x in (mask.q_segment_ids, mask.kv_segment_ids))

    def padded(ids: Array, padding: int) -> Array:
        ids = pad_to_blocks(ids, 1, block, padding)
        return jnp.broadcast_to(ids, (rows, ids.shape[1]))

    return splash_attention_kernel.SegmentIds(padded(q_ids, _Q_PADDING), padded(kv_ids, _KV_PADDING))


def _attend(
    causal: bool,
    window: tuple[int, int] | None,
    block: int,
    softcap: float | None,
    interpret: bool,
    q_BxHxQxh: Array,
    k_BxGxKxh: Array,
    v_BxGxKxh: Array,
    segments: splash_attention_kernel.SegmentIds | None,
) -> Array:
    shape = (q_BxHxQxh.shape[2], k_BxGxKxh.shape[2])
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([_static_mask(shape, causal, window)] * q_BxHxQxh.shape[1]),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    return jax.vmap(kernel)(q_BxHxQxh, k_BxGxKxh, v_BxGxKxh, segments)


def _static_mask(shape: tuple[int, int], causal: bool, window: tuple[int, int] | None) -> splash_attention_mask.Mask:
    """Return a mask that is computed block by block."""
    if window is not None:
        left, right = window
        return splash_attention_mask.LocalMask(shape, (left, 0 if causal else right), 0)
    return splash_attention_mask.CausalMask(shape) if causal else splash_attention_mask.FullMask(shape)
