"""Documents and supervised pairs of any length, several to a row: first-fit packing, planned once.

The plan is made when the store is opened, from the documents' lengths alone: documents in a pseudo-random order are
put into the first of the open rows that has room. So a row of the plan is the same documents in every epoch, and an
epoch is a permutation of the rows; what noise a document gets is another in each epoch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from t5x_like.config.data import DataConfig
from t5x_like.config.errors import DataError
from t5x_like.config.lengths import expected_loss_tokens, longest, raw_window_length
from t5x_like.config.objectives import Objective, Supervised
from t5x_like.data import keys as rng
from t5x_like.data.denoise import Examples, denoise
from t5x_like.data.store import Split
from t5x_like.data.vocabulary import EOS_ID, TokenTraits, Vocabulary
from t5x_like.data.whole_rows import Integers, WholeRows

OPEN_ROWS = 64
"""Rows that are filled at the same time. More fill better and are slower to search."""

_ORDER, _OBJECTIVE, _SHUFFLE = range(1, 4)


def first_fit(lengths: npt.NDArray[np.int64], capacity: Sequence[int], open_rows: int = OPEN_ROWS) -> Integers:
    """[N]: the row that each example goes to: the first of the `open_rows` newest rows that has room, or a new one.

    Args:
      lengths: [N, K] cells of each example in each of K streams (encoder, decoder), none above the capacity.
      capacity: [K] cells of a row.
    """
    row_N = np.empty(len(lengths), np.int64)
    open_: list[list[int]] = []
    made = 0
    for index, cells in enumerate(lengths.tolist()):
        for row in open_:
            if all(size <= free for size, free in zip(cells, row, strict=False)):
                break
        else:
            row = [*capacity, made]
            made += 1
            open_.append(row)
            if len(open_) > open_rows:
                del open_[0]
        for stream, size in enumerate(cells):
            row[stream] -= size
        row_N[index] = row[-1]
    return row_N


@dataclasses.dataclass(frozen=True)
class Piece:
    """N examples as stretches of the flat array: inputs (of pairs only) and targets, or the text.

    Attributes:
      objective_N: Index into the corpus's objectives.
      inputs_NxB, targets_NxB: [N, 2] first and last + 1 token; the inputs are empty where there are none.
      row_N: Row of the plan.
      segment_N: From 1, the place within the row.
    """

    objective_N: Integers
    inputs_NxB: Integers
    targets_NxB: Integers
    row_N: Integers
    segment_N: Integers


class Packed(WholeRows):
    """The packed rows of one corpus.

    Attributes:
      num_rows: Rows of an epoch.
      cut: Pairs that are longer than a row and are trimmed to it.
      too_short: Documents of less than two tokens, which are left out.

    Raises:
      DataError: nothing is left.
    """

    def __init__(self, split: Split, parts: int, data: DataConfig, objectives: tuple[Objective, ...], key: rng.Keys):
        self._split = split
        self._objectives = objectives
        self._key = key
        self._shuffle_key = rng.fold_in(key, _SHUFFLE)
        self._data = data
        inputs, targets, objective_N, self.cut, self.too_short = self._pairs(parts) if parts == 2 else self._texts()
        if not len(targets):
            raise DataError(
                f"{split.name} split of {split.num_documents:,} documents: found none of at least two tokens, expected "
                "documents to train on"
            )
        order_N = np.argsort(rng.bits(rng.fold_in(key, _ORDER), 0, len(targets))[0])
        inputs, targets, objective_N = inputs[order_N], targets[order_N], objective_N[order_N]
        cells_NxK = self._cells(inputs, targets, objective_N)
        row_N = first_fit(cells_NxK, self._capacity)
        by_row = np.argsort(row_N, kind="stable")
        row_N = row_N[by_row]
        self._first = np.searchsorted(row_N, np.arange(row_N[-1] + 2))
        self._plan = Piece(
            objective_N[by_row],
            inputs[by_row],
            targets[by_row],
            row_N,
            np.arange(len(row_N)) - self._first[row_N] + 1,
        )
        self.num_rows = len(self._first) - 1

    @property
    def num_pieces(self) -> int:
        """Examples of an epoch."""
        return len(self._plan.row_N)

    def row_means(self, objective: Objective) -> tuple[float, float]:
        """(raw tokens, tokens of the loss) of a row under one of the objectives, on average over the plan."""
        mine = self._plan.objective_N == self._objectives.index(objective)
        raw_M = np.diff(self._plan.targets_NxB[mine])[:, 0]
        lengths, counts = np.unique(raw_M, return_counts=True)
        each = [expected_loss_tokens(objective, length) for length in lengths.tolist()]
        loss = float(np.dot(each, counts))
        given = np.diff(self._plan.inputs_NxB[mine]).sum()
        return float(raw_M.sum() + given) / self.num_rows, loss / self.num_rows

    def row_share(self, objective: Objective) -> float:
        """Share of the rows that the examples of an objective are: of a row of k examples each has 1 / k."""
        examples_R = np.diff(self._first)
        mine = self._plan.objective_N == self._objectives.index(objective)
        return float((mine / examples_R[self._plan.row_N]).sum()) / self.num_rows

    def pick(self, index_M: Integers) -> Piece:
        """Examples by their index in the plan."""
        return Piece(*(getattr(self._plan, field.name)[index_M] for field in dataclasses.fields(Piece)))

    def pieces(self, plan_row_N: Integers) -> tuple[Piece, Integers]:
        """The examples of rows of the plan, and for each the index in `plan_row_N` of its row."""
        first_N, last_N = self._first[plan_row_N], self._first[plan_row_N + 1]
        counts_N = last_N - first_N
        owner_M = np.repeat(np.arange(len(plan_row_N)), counts_N)
        index_M = np.arange(counts_N.sum()) - np.repeat(np.cumsum(counts_N) - counts_N, counts_N) + first_N[owner_M]
        return self.pick(index_M), owner_M

    def examples(
        self, piece: Piece, keys_N: rng.Keys, objective: int, vocabulary: Vocabulary, traits: TokenTraits | None
    ) -> Iterator[tuple[Integers, Examples]]:
        """(indices, Examples) of the pieces under one objective: those of one length at a time."""
        spec = self._objectives[objective]
        mine = np.flatnonzero(piece.objective_N == objective)
        if isinstance(spec, Supervised):
            if mine.size:
                yield mine, self._supervised(piece, mine, spec, vocabulary)
            return
        lengths = np.diff(piece.targets_NxB[mine], axis=1)[:, 0]
        for length in np.unique(lengths).tolist():
            some = mine[lengths == length]
            tokens = self._split.gather(piece.targets_NxB[some, 0], length)
            yield some, denoise(tokens, keys_N[some], spec, vocabulary, traits)

    @property
    def _capacity(self) -> tuple[int, ...]:
        data = self._data
        if data.layout == "encoder_decoder":
            return data.inputs_length, data.targets_length
        return (data.inputs_length if data.layout == "encoder" else data.row_length,)

    def _texts(self) -> tuple[Integers, Integers, Integers, int, int]:
        """Documents, without their EOS, in pieces that fit a row, each under an objective drawn by the rates."""
        offsets = self._split.offsets.astype(np.int64)
        first_D, length_D = offsets[:-1], np.diff(offsets) - 1
        rates = np.array([objective.rate for objective in self._objectives])
        word_D = rng.bits(rng.fold_in(self._key, _OBJECTIVE), 0, len(first_D))[0]
        share_D = (word_D >> np.uint64(11)).astype(np.float64) * 2.0**-53
        objective_D = np.searchsorted(np.cumsum(rates / rates.sum())[:-1], share_D, side="right")
        data = self._data
        windows = np.array(
            [
                raw_window_length(objective, data.layout, data.inputs_length, data.targets_length)
                for objective in self._objectives
            ]
        )
        window_D = windows[objective_D]
        pieces_D = -(-length_D // window_D)
        document_N = np.repeat(np.arange(len(first_D)), pieces_D)
        number_N = np.arange(len(document_N)) - np.repeat(np.cumsum(pieces_D) - pieces_D, pieces_D)
        # Pieces of one document are of about equal length, so that none is a tail of a token or two.
        start_N = number_N * length_D[document_N] // pieces_D[document_N]
        stop_N = (number_N + 1) * length_D[document_N] // pieces_D[document_N]
        long_enough = stop_N - start_N >= 2
        targets = (first_D[document_N] + np.stack([start_N, stop_N]))[:, long_enough].T
        too_short = int((length_D < 2).sum())
        return np.zeros_like(targets), targets, objective_D[document_N][long_enough], 0, too_short

    def _pairs(self, parts: int) -> tuple[Integers, Integers, Integers, int, int]:
        bounds = self._split.offsets.astype(np.int64)
        inputs = np.stack([bounds[:-1:parts], bounds[1::parts]], axis=1)
        targets = np.stack([bounds[1::parts], bounds[2::parts]], axis=1)
        data, mode = self._data, self._objectives[0].mode is not None
        room = data.inputs_length - 1 - mode
        long_inputs = np.diff(inputs)[:, 0] > room
        inputs[:, 1] = np.minimum(inputs[:, 1], inputs[:, 0] + room)
        room = data.targets_length - 1
        long_targets = np.diff(targets)[:, 0] > room
        targets[:, 1] = np.minimum(targets[:, 1], targets[:, 0] + room)
        present = np.diff(targets)[:, 0] > 0
        cut = int((long_inputs | long_targets).sum())
        return inputs[present], targets[present], np.zeros(int(present.sum()), np.int64), cut, int((~present).sum())

    def _cells(self, inputs: Integers, targets: Integers, objective_N: Integers) -> Integers:
        """[N, K] cells of each example at most."""
        text_N = np.diff(targets)[:, 0]
        cells = np.empty((len(text_N), len(self._capacity)), np.int64)
        for index, objective in enumerate(self._objectives):
            mine = np.flatnonzero(objective_N == index)
            if isinstance(objective, Supervised):
                given = np.diff(inputs[mine])[:, 0] + 1 + (objective.mode is not None)
                wanted = text_N[mine] + 1
                both = np.stack([given, wanted], axis=1)
                cells[mine] = both if cells.shape[1] == 2 else both.sum(axis=1, keepdims=True)
                continue
            lengths, which = np.unique(text_N[mine], return_inverse=True)
            table = [longest(objective, length) for length in lengths.tolist()]
            if cells.shape[1] == 2:
                cells[mine] = np.array([(item.inputs, item.targets) for item in table], np.int64).reshape(-1, 2)[which]
            else:
                one = [item.total if self._single else item.inputs for item in table]
                cells[mine] = np.array(one, np.int64)[which, None]
        return cells

    @property
    def _single(self) -> bool:
        return self._data.layout in ("prefix_lm", "causal_lm")

    def _supervised(self, piece: Piece, mine: Integers, spec: Supervised, vocabulary: Vocabulary) -> Examples:
        mode = [] if spec.mode is None else [vocabulary.mode_id(spec.mode)]
        inputs = [[*mode, *self._split.tokens(a, b).tolist(), EOS_ID] for a, b in piece.inputs_NxB[mine].tolist()]
        targets = [[*self._split.tokens(a, b).tolist(), EOS_ID] for a, b in piece.targets_NxB[mine].tolist()]
        return Examples(_padded(inputs), _padded(targets), _lengths(inputs), _lengths(targets))


def _lengths(rows: list[list[int]]) -> Integers:
    return np.array([len(row) for row in rows], np.int64)


def _padded(rows: list[list[int]]) -> npt.NDArray[np.int32]:
    padded = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded
