"""Plan of packed rows: which examples share a row.

A plan is an array of `WORDS` or `2 * WORDS` words per example, in the order of the rows, and an array of the first
example of each row. Both can be in memory, in temporary files, or beside a token store (`data.store.stored_plan`), from
which the words of a row are read by index.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import numpy.typing as npt

from t5x_like.config.objectives import Objective
from t5x_like.data.store.stored_plan import ObjectiveTotals, PlanTotals
from t5x_like.data.stream.feature_converters import ranges
from t5x_like.errors import DataError
from t5x_like.utils.type_aliases import IntArray

WORDS = 2
"""Words of a range of tokens: its start; its length, the number of the objective and a bit for cut targets."""
_LENGTH_BITS, _CUT_BIT = np.uint64(40), np.uint64(63)
_MAX_PER_ROW = 2**20
"""Bound of the examples of a row, for plans that come from others. A row has a token or more of each."""
_LENGTH = (np.uint64(1) << _LENGTH_BITS) - np.uint64(1)

Words = npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True)
class PackedExample:
    """N examples as ranges of the split's flat token array: inputs (of pairs only) and targets, or the text.

    Attributes:
      objective_N: Index into the corpus's objectives.
      inputs_NxB, targets_NxB: [N, 2] (start, stop) in tokens; the inputs are empty for text.
      cut_N: 1 for pairs whose targets are truncated, which get no EOS.
    """

    objective_N: IntArray
    inputs_NxB: IntArray
    targets_NxB: IntArray
    cut_N: IntArray

    def __len__(self) -> int:
        return len(self.objective_N)

    def select(self, index_M: IntArray) -> PackedExample:
        """Return the examples with these indices, in this order."""
        return PackedExample(**{name: values[index_M] for name, values in vars(self).items()})

    def words(self, *, with_inputs: bool) -> Words:
        """Return [N, W]: the examples as words; without their inputs W is `WORDS`, otherwise twice that."""
        ranges = (self.targets_NxB, self.inputs_NxB)[: 1 + with_inputs]
        words = np.stack([part for both in ranges for part in (both[:, 0], both[:, 1] - both[:, 0])], axis=1)
        words = words.astype(np.uint64)
        words[:, 1] |= self.objective_N.astype(np.uint64) << _LENGTH_BITS | self.cut_N.astype(np.uint64) << _CUT_BIT
        return words

    @staticmethod
    def from_words(words_NxW: Words) -> PackedExample:
        """Return the examples of `words`."""
        # The objective is between the length and the highest bit.
        objective_N = (words_NxW[:, 1] & ~(np.uint64(1) << _CUT_BIT)) >> _LENGTH_BITS
        targets = _range(words_NxW[:, 0], words_NxW[:, 1])
        inputs = _range(words_NxW[:, 2], words_NxW[:, 3]) if words_NxW.shape[1] > WORDS else np.zeros_like(targets)
        cut_N = words_NxW[:, 1] >> _CUT_BIT
        return PackedExample(objective_N.astype(np.int64), inputs, targets, cut_N.astype(np.int64))


def _range(start_N: Words, length_N: Words) -> IntArray:
    return np.stack([start_N, start_N + (length_N & _LENGTH)], axis=1).astype(np.int64)


class WordArray(Protocol):
    """Array of words from which elements are read by index: a NumPy array, or one beside a token store."""

    def __getitem__(self, index: IntArray, /) -> Words: ...


class WordSink(Protocol):
    """Array of words that grows at its end."""

    def append(self, values: Words) -> None: ...


class PackingPlan:
    """Readable plan.

    Args:
      totals: Counts of the plan.
      examples: Words of the examples, in the order of their rows.
      first_example: [rows + 1]: the examples of row r are first_example[r]:first_example[r + 1].
      num_tokens: Tokens of the split. Words that point beyond it are refused.
      has_inputs: Whether an example has inputs and targets.
    """

    def __init__(
        self, totals: PlanTotals, examples: WordArray, first_example: WordArray, num_tokens: int, *, has_inputs: bool
    ):
        self.totals = totals
        self._examples, self._first_example = examples, first_example
        self._num_tokens = num_tokens
        self._words = 2 * WORDS if has_inputs else WORDS

    def take(self, index_M: IntArray) -> PackedExample:
        """Return examples by their index in the plan.

        Raises:
          DataError: an example is outside of the split.
        """
        words = self._examples[(index_M[:, None] * self._words + np.arange(self._words)).ravel()]
        found = PackedExample.from_words(np.asarray(words).reshape(-1, self._words))
        # A plan beside a store may come from others.
        bounds = np.stack([found.targets_NxB, found.inputs_NxB])
        in_split = ((bounds >= 0) & (bounds <= self._num_tokens)).all() and (bounds[..., 0] <= bounds[..., 1]).all()
        if not in_split or (found.objective_N >= len(self.totals.objectives)).any():
            raise damaged_plan(f"an example outside of the {self._num_tokens:,} tokens of the split")
        return found

    def examples_of_rows(self, row_N: IntArray) -> tuple[PackedExample, IntArray, IntArray]:
        """Return the M examples of N rows, the index of the row in 0..N-1 of each [M], and its segment [M] from 1.

        Raises:
          DataError: the plan is damaged.
        """
        bounds_Nx2 = np.asarray(self._first_example[np.stack([row_N, row_N + 1], axis=1).ravel()]).reshape(-1, 2)
        first_N, last_N = bounds_Nx2.astype(np.int64).T
        counts_N = last_N - first_N
        if ((counts_N < 1) | (counts_N > _MAX_PER_ROW) | (last_N > self.totals.examples)).any():
            raise damaged_plan("a row of no examples, or of too many")
        row_M = np.repeat(np.arange(len(row_N)), counts_N)
        rank_M = ranges(counts_N)
        return self.take(rank_M + first_N[row_M]), row_M, rank_M + 1


def damaged_plan(problem: str) -> DataError:
    """Return the error for a plan that is not the one of its store."""
    return DataError(
        f"packing plan: found {problem}, expected the plan of this store; delete the folder `packing` beside the "
        "tokens of its split, and run `t5x-like prepare RECIPE`"
    )


class PlanBuilder:
    """Writes a plan: parts of the corpus are appended, and `finish` returns the totals.

    Args:
      objectives: Objectives of the corpus.
      examples, first_example: Receive the words of the examples and the first examples of the rows.
      has_inputs: Whether an example has inputs and targets.

    Attributes:
      num_examples: Examples so far.
    """

    def __init__(
        self, objectives: Sequence[Objective], examples: WordSink, first_example: WordSink, *, has_inputs: bool
    ):
        self._objectives = objectives
        self._examples, self._first_example = examples, first_example
        self._has_inputs = has_inputs
        self._num_rows = self.num_examples = 0
        self._shares = [0.0] * len(objectives)
        self._input_tokens = [0] * len(objectives)
        # Number of examples of each length, by objective.
        self._lengths = [np.zeros(0, np.int64) for _ in objectives]

    def append(self, examples: PackedExample, row_N: IntArray) -> None:
        """Append examples with their rows, which are counted from 0 in each call."""
        # Examples of one row become neighbours. The stable sort keeps their order within the row.
        by_row = np.argsort(row_N, kind="stable")
        examples, row_N = examples.select(by_row), row_N[by_row]
        num_rows = int(row_N[-1]) + 1
        start_R = np.searchsorted(row_N, np.arange(num_rows))
        self._examples.append(examples.words(with_inputs=self._has_inputs).ravel())
        self._first_example.append((start_R + self.num_examples).astype(np.uint64))
        self._count(examples, np.diff(start_R, append=len(row_N))[row_N])
        self._num_rows += num_rows
        self.num_examples += len(examples)

    def _count(self, examples: PackedExample, neighbours_N: IntArray) -> None:
        length_N = np.diff(examples.targets_NxB)[:, 0]
        input_N = np.diff(examples.inputs_NxB)[:, 0]
        for index, objective in enumerate(self._objectives):
            selected = examples.objective_N == index
            # In a row of k examples each counts 1 / k.
            self._shares[index] += float((1 / neighbours_N[selected]).sum())
            counts, added = self._lengths[index], np.bincount(length_N[selected])
            size = max(len(counts), len(added))
            self._lengths[index] = np.pad(counts, (0, size - len(counts))) + np.pad(added, (0, size - len(added)))
            # The two sequences of a dialogue are its tokens and their mask, of equal length.
            if objective.example_source != "dialogues":
                self._input_tokens[index] += int(input_N[selected].sum())

    def finish(self) -> PlanTotals:
        """Write the end of the plan and return its totals."""
        self._first_example.append(np.array([self.num_examples], np.uint64))
        totals = []
        for index, objective in enumerate(self._objectives):
            # Loss tokens are a function of the length alone.
            counts_L = self._lengths[index]
            lengths = np.flatnonzero(counts_L)
            loss_tokens = [objective.expected_loss_tokens(length) for length in lengths.tolist()]
            raw_tokens = int(np.dot(lengths, counts_L[lengths])) + self._input_tokens[index]
            loss = float(np.dot(loss_tokens, counts_L[lengths]))
            totals.append(ObjectiveTotals(rows=self._shares[index], raw_tokens=raw_tokens, loss_tokens=loss))
        return PlanTotals(rows=self._num_rows, examples=self.num_examples, objectives=tuple(totals))


class WordColumn:
    """Array of words that grows at its end: in memory, or in a temporary file that is mapped into memory.

    Args:
      folder: Folder for the temporary file; None: the array is in memory.
    """

    def __init__(self, folder: Path | None):
        self._file: IO[bytes] | None = None
        if folder is not None:
            # Beside the store if possible: the default folder of temporary files is often small or in memory.
            self._file = tempfile.TemporaryFile(dir=folder if os.access(folder, os.W_OK) else None)
        self._parts: list[Words] = []
        self._length = 0

    def append(self, values: Words) -> None:
        """Append words."""
        self._length += len(values)
        if self._file is None:
            self._parts.append(values)
        else:
            self._file.write(np.ascontiguousarray(values).data)

    def finish(self) -> Words:
        """Return the array."""
        if self._file is None:
            return np.concatenate(self._parts)
        self._file.flush()
        return np.memmap(self._file, np.uint64, "r", shape=(self._length,))
