"""Plan of packed rows: which examples share a row, by first fit over the newest rows.

The plan of a small corpus is one part, in memory. That of a large one is made in parts of `DOCUMENTS_PER_PART`
documents and kept in temporary files, so that the memory that it needs does not grow with the corpus.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from t5x_like.utils.type_aliases import IntArray

OPEN_ROWS = 64
"""Number of rows that are filled at the same time. More rows fill better and take longer to search."""
DOCUMENTS_PER_PART = 2**21
"""Documents of one part of a plan."""
LANES = 512
"""Parts of a plan of several parts are packed in this many lanes, each on its own, which NumPy computes together."""
_CHUNK = 2**20


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


@dataclasses.dataclass(frozen=True)
class PackedExample:
    """N examples as ranges of the split's flat token array: inputs (of pairs only) and targets, or the text.

    Attributes:
      objective_N: Index into the corpus's objectives.
      inputs_NxB, targets_NxB: [N, 2] (start, stop) in tokens; the inputs are empty for text.
      cut_N: 1 for pairs whose targets are truncated, which get no EOS.
      row_N: Row of the plan.
      segment_N: Number of the example within its row, from 1.
    """

    objective_N: IntArray
    inputs_NxB: IntArray
    targets_NxB: IntArray
    cut_N: IntArray
    row_N: IntArray
    segment_N: IntArray


class PackingPlan:
    """Examples in the order of their rows, to which parts of the corpus are appended; then `finish` is called.

    Args:
      folder: Folder for temporary files; None: the plan is in memory.

    Attributes:
      num_rows: Rows so far.
      num_examples: Examples so far.
    """

    def __init__(self, folder: Path | None):
        names = [field.name for field in dataclasses.fields(PackedExample)]
        self._columns = {name: _Column(folder) for name in names}
        self._starts = _Column(folder)
        self.num_rows = self.num_examples = 0

    def append(
        self, objective_N: IntArray, inputs: IntArray, targets: IntArray, cut_N: IntArray, row_N: IntArray
    ) -> None:
        """Append examples with their rows, which are counted from 0 in each call."""
        # Examples of one row become neighbours. The stable sort keeps their order within the row.
        by_row = np.argsort(row_N, kind="stable")
        row_N = row_N[by_row]
        num_rows = int(row_N[-1]) + 1
        start_R = np.searchsorted(row_N, np.arange(num_rows))
        columns = {
            "objective_N": objective_N[by_row],
            "inputs_NxB": inputs[by_row],
            "targets_NxB": targets[by_row],
            "cut_N": cut_N[by_row],
            "row_N": row_N + self.num_rows,
            "segment_N": np.arange(len(row_N)) - start_R[row_N] + 1,
        }
        for name, values in columns.items():
            self._columns[name].append(values)
        self._starts.append(start_R + self.num_examples)
        self.num_rows += num_rows
        self.num_examples += len(row_N)

    def finish(self) -> None:
        """Make the plan readable."""
        self._starts.append(np.array([self.num_examples]))
        self.first_example = self._starts.finish()
        """[rows + 1]: the examples of row r are first_example[r]:first_example[r + 1]."""
        self._arrays = {name: column.finish() for name, column in self._columns.items()}

    def take(self, index_M: IntArray | slice) -> PackedExample:
        """Return examples by their index in the plan."""
        return PackedExample(**{name: np.asarray(values[index_M]) for name, values in self._arrays.items()})

    def chunks(self) -> Iterator[PackedExample]:
        """Yield all examples in parts that fit into memory."""
        for first in range(0, self.num_examples, _CHUNK):
            yield self.take(slice(first, first + _CHUNK))


class _Column:
    """Array that grows at its end: in memory, or in a temporary file that is mapped into memory."""

    def __init__(self, folder: Path | None):
        self._file: IO[bytes] | None = None
        if folder is not None:
            # Beside the store if possible: the default folder of temporary files is often small or in memory.
            self._file = tempfile.TemporaryFile(dir=folder if os.access(folder, os.W_OK) else None)
        self._parts: list[npt.NDArray[Any]] = []
        self._length = 0

    def append(self, values: npt.NDArray[Any]) -> None:
        values = values.astype(np.int64, copy=False)
        self._length += len(values)
        if self._file is None:
            self._parts.append(values)
        else:
            self._file.write(np.ascontiguousarray(values).data)
            # An empty array keeps the trailing dimensions for `finish`.
            self._parts = [values[:0]]

    def finish(self) -> npt.NDArray[Any]:
        if self._file is None:
            return np.concatenate(self._parts)
        self._file.flush()
        shape = (self._length, *self._parts[0].shape[1:])
        return np.memmap(self._file, np.int64, "r", shape=shape)
