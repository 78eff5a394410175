"""First fit over the newest rows: the row of each example of a packing plan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from t5x_like.utils.type_aliases import IntArray

OPEN_ROWS = 64
"""Number of rows that are filled at the same time. More rows fill better and take longer to search."""
LANES = 512
"""Parts of a plan of several parts are packed in this many lanes, each on its own, which NumPy computes together."""


def first_fit(lengths: npt.NDArray[np.int64], capacity: Sequence[int], open_rows: int = OPEN_ROWS) -> IntArray:
    """Return [N]: the row of each example, the first of the `open_rows` newest rows that it fits, or a new row.

    Args:
      lengths: [N, K] token positions of each example in each of K stacks (encoder, decoder), none above the capacity.
      capacity: [K] token positions of a row.
      open_rows: Number of rows that are searched.
    """
    # First fit with a bounded number of open rows. The search would be quadratic otherwise, and 64 open rows leave
    # little unfilled.
    row_N = np.empty(len(lengths), np.int64)
    # An open row is a list: the free positions of each stack, then the index of the row.
    open_list: list[list[int]] = []
    num_rows = 0
    for index, sizes in enumerate(lengths.tolist()):
        for row in open_list:
            if all(size <= free for size, free in zip(sizes, row, strict=False)):
                break
        else:
            row = [*capacity, num_rows]
            num_rows += 1
            open_list.append(row)
            if len(open_list) > open_rows:
                # The oldest row is closed: it had the most chances to be filled.
                del open_list[0]
        # An example needs room in every stack at once, because its segments have the same number in both.
        for stack, size in enumerate(sizes):
            row[stack] -= size
        row_N[index] = row[-1]
    return row_N


def first_fit_of_first(
    lengths: npt.NDArray[np.int64], capacity: Sequence[int], count: int, open_rows: int = OPEN_ROWS
) -> tuple[IntArray, IntArray]:
    """Return the examples [M] of the first rows of `first_fit`, at least `count` if there are as many, and their rows.

    Only as many examples as are needed for complete rows are packed.
    """
    size = 4 * count
    while size < len(lengths):
        row_N = first_fit(lengths[:size], capacity, open_rows)
        # A row is complete when it is not among the newest.
        example_M = np.flatnonzero(row_N <= row_N.max() - open_rows)
        if len(example_M) >= count:
            return example_M, row_N[example_M]
        size *= 2
    return np.arange(len(lengths)), first_fit(lengths, capacity, open_rows)


def first_fit_in_lanes(
    lengths: npt.NDArray[np.int64], capacity: Sequence[int], lanes: int = LANES, open_rows: int = OPEN_ROWS
) -> IntArray:
    """Return [N]: the row of each example if `first_fit` packs consecutive lanes of the examples one after the other.

    All lanes advance together, so that the time per example is about a hundredth of that of `first_fit`.
    """
    count, stacks = lengths.shape
    steps = max(-(-count // lanes), 1)
    lanes = -(-count // steps)
    sizes_LxSxK = np.zeros((lanes * steps, stacks), np.int64)
    sizes_LxSxK[:count] = lengths
    sizes_LxSxK = sizes_LxSxK.reshape(lanes, steps, stacks)
    # The open rows of a lane are a ring: row r is in slot r % open_rows until row r + open_rows replaces it.
    free_LxOxK = np.zeros((lanes, open_rows, stacks), np.int64)
    row_LxO = np.full((lanes, open_rows), -1, np.int64)
    num_rows_L, lane_L = np.zeros(lanes, np.int64), np.arange(lanes)
    found_LxS = np.empty((lanes, steps), np.int64)
    none = np.iinfo(np.int64).max
    for step in range(steps):
        sizes_LxK = sizes_LxSxK[:, step]
        fits_LxO = (row_LxO >= 0) & (sizes_LxK[:, None] <= free_LxOxK).all(-1)
        # The oldest row that fits has the smallest number.
        slot_L = np.where(fits_LxO, row_LxO, none).argmin(axis=1)
        is_new_L = ~fits_LxO[lane_L, slot_L]
        slot_L[is_new_L] = num_rows_L[is_new_L] % open_rows
        row_LxO[lane_L[is_new_L], slot_L[is_new_L]] = num_rows_L[is_new_L]
        free_LxOxK[lane_L[is_new_L], slot_L[is_new_L]] = capacity
        # Lanes are padded with examples without tokens, which begin no row.
        num_rows_L[is_new_L] += 1
        free_LxOxK[lane_L, slot_L] -= sizes_LxK
        found_LxS[:, step] = row_LxO[lane_L, slot_L]
    first_row_L = np.cumsum(num_rows_L) - num_rows_L
    return (found_LxS + first_row_L[:, None]).reshape(-1)[:count]
