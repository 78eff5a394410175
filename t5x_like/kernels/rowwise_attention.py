"""Blockwise attention of a few rows at a time, for CPUs: the scores of a block stay in the cache of a core.

Scores of all rows, as the reference and blockwise attention compute them, are written to memory and read again by each
operation on them. Here a loop over the rows is outermost. The blocks of short rows are static: each block of queries
has the keys that the causal limit and the window let it reach as one block, so that its softmax needs no rescaling.
"""

from __future__ import annotations

from collections.abc import Sequence

from t5x_like.kernels.attention_backend import AttentionRequest
from t5x_like.kernels.attention_block import BlockShape
from t5x_like.kernels.attention_masks import BlockwiseMask
from t5x_like.kernels.blockwise_attention import BlockwiseAttention, block_size


class RowwiseAttention(BlockwiseAttention):
    """Attention in blocks of rows, queries and keys.

    On a mesh of several devices all rows are computed together, since XLA does not partition a loop over them.

    Attributes:
      short: Largest length of rows whose blocks are static. Each of them is compiled, and T5's bias and the dropout
        mask are made as a whole.
      q_short: Smallest number of queries of a static block.
      static_blocks: Largest number of static blocks of queries.
      scores: Number of scores of a block; a block has at least one row.
    """

    needs_placement = True
    gathers_keys = False

    def __init__(
        self,
        q_block: int = 256,
        kv_block: int = 512,
        *,
        short: int = 1024,
        q_short: int = 128,
        static_blocks: int = 4,
        scores: int = 2**18,
    ) -> None:
        super().__init__(q_block, kv_block)
        self.short, self.q_short, self.static_blocks, self.scores = short, q_short, static_blocks, scores

    def supports(self, request: AttentionRequest) -> str | None:
        if request.split is not None:
            return 'it computes whole rows, and the sequence is split over devices; set attention="blockwise"'
        return super().supports(request)

    def block_shape(self, q_shape: Sequence[int], kv_lengths: tuple[int, ...], mask: BlockwiseMask) -> BlockShape:
        rows, q_length, heads, _ = q_shape
        longest = max(q_length, *kv_lengths)
        q_block, kv_block, joined_keys = self.q_block, self.kv_block, 0
        if longest <= self.short:
            q_block = kv_block = max(self.q_short, -(-q_length // self.static_blocks))
            joined_keys = self.short
        q_block = block_size(q_length, q_block)
        kv_blocks = tuple(block_size(length, kv_block) for length in kv_lengths)
        row_block = rows
        if mask.split is None:
            keys = longest if joined_keys else max(kv_blocks)
            most = max(1, self.scores // (heads * q_block * keys))
            row_block = max(size for size in range(1, rows + 1) if rows % size == 0 and size <= most)
        return BlockShape(rows, heads, q_length, kv_lengths, row_block, q_block, kv_blocks, joined_keys)
