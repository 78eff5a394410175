"""LongT5's transient global tokens: the sums of blocks of tokens, which all tokens of a text attend to."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from t5x_like.kernels.attention_masks import MaskSpec
from t5x_like.sharding.constrain import constrain


@dataclasses.dataclass(frozen=True)
class TextBlocks:
    """Blocks of a batch of rows. A row of L tokens has room for L // block_size blocks.

    Attributes:
      index: int32 [B, L], the block that each token belongs to; the number of blocks for a token of none.
      mask: Mask of the attention from tokens to blocks, with positions counted in blocks.
      count: Number of blocks that a row has room for.
    """

    index: Array
    mask: MaskSpec
    count: int


def text_blocks(segment_ids_BxL: Array, block_size: int) -> TextBlocks:
    """Return the blocks of rows of texts.

    A text has as many blocks as fit into it; the tokens after the last one belong to it, too. The blocks of the texts
    of a row follow each other.

    Args:
      segment_ids_BxL: int32, text of each token, 0 for padding.
      block_size: Number of tokens of a block.
    """
    rows, length = segment_ids_BxL.shape
    valid = segment_ids_BxL != 0
    changes = jnp.diff(segment_ids_BxL, axis=1) != 0
    edge = jnp.ones((rows, 1), bool)
    starts, ends = jnp.concatenate([edge, changes], axis=1), jnp.concatenate([changes, edge], axis=1)
    indices = jnp.arange(length)[None]
    within = indices - jax.lax.cummax(jnp.where(starts, indices, 0), axis=1)
    is_last = (within % block_size == block_size - 1) & valid
    so_far = jnp.cumsum(is_last, axis=1)
    # Counts grow along the row, so the largest and the smallest one belong to the nearest edge of a text.
    before = jax.lax.cummax(jnp.where(starts, so_far - is_last, 0), axis=1)
    up_to_end = jax.lax.cummin(jnp.where(ends, so_far, length), axis=1, reverse=True)
    block = before + jnp.minimum(within // block_size, up_to_end - before - 1)
    count = length // block_size
    index = jnp.where(valid & (up_to_end > before), block, count)
    # The text of each block; 0, which hides it, for blocks that no text has.
    texts = jnp.zeros((rows, count), segment_ids_BxL.dtype)
    texts = jax.vmap(lambda row, at, ids: row.at[at].set(ids, mode="drop"))(texts, index, segment_ids_BxL)
    mask = MaskSpec(
        q_positions=block,
        kv_positions=jnp.broadcast_to(jnp.arange(count), (rows, count)),
        # Padding has an id that no block has.
        q_segment_ids=jnp.where(valid, segment_ids_BxL, -1),
        kv_segment_ids=texts,
    )
    return TextBlocks(index, mask, count)


def sum_blocks(x_BxLxd: Array, index_BxL: Array, count: int) -> Array:
    """Return the sums of the states of each block, [B, count, d], added up in float32."""

    def of_row(x_Lxd: Array, index_L: Array) -> Array:
        return jax.ops.segment_sum(x_Lxd.astype(jnp.float32), index_L, num_segments=count + 1)[:count]

    sums = jax.vmap(of_row)(x_BxLxd, index_BxL).astype(x_BxLxd.dtype)
    return constrain(sums, ("batch", None, "embed"))
