"""Blocks of LongT5's transient global tokens, against loops over the tokens of each text."""

import numpy as np

from t5x_like.kernels.attention_masks import dense_mask
from t5x_like.models.block_sums import sum_blocks, text_blocks

SIZE = 3
ROWS = np.array(
    [
        [1] * 11 + [0],
        [1, 1, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3],
        [4, 4, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0],
        [5, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ],
    np.int32,
)


def test_blocks_belong_to_one_text_and_its_last_tokens_to_the_last_block():
    rows, length = ROWS.shape
    blocks = text_blocks(ROWS, SIZE)
    assert blocks.count == length // SIZE
    visible = np.asarray(dense_mask(blocks.mask, length, blocks.count))[:, 0]
    x = np.random.default_rng(0).normal(size=(rows, length, 5)).astype(np.float32)
    sums = np.asarray(sum_blocks(x, blocks.index, blocks.count))
    for row in range(rows):
        first = 0
        for text in dict.fromkeys(ROWS[row]):
            places = np.flatnonzero(ROWS[row] == text)
            own = len(places) // SIZE if text else 0
            for number, place in enumerate(places):
                block = first + min(number // SIZE, own - 1)
                assert blocks.index[row, place] == (block if own else blocks.count)
                expected = [first <= each < first + own for each in range(blocks.count)]
                assert visible[row, place].tolist() == expected
                if own:
                    distances = np.asarray(blocks.mask.kv_positions[row] - blocks.mask.q_positions[row, place])
                    assert distances.tolist() == [each - block for each in range(blocks.count)]
            for block in range(own):
                end = (block + 1) * SIZE if block + 1 < own else len(places)
                expected = x[row, places[block * SIZE : end]].sum(0)
                np.testing.assert_allclose(sums[row, first + block], expected, rtol=1e-6)
            first += own
