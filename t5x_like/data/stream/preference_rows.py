"""Rows of preference pairs: a prompt with the chosen answer, and the prompt with the rejected one, once or packed."""

from __future__ import annotations

from typing import Any

import numpy as np

from t5x_like.config.batch_spec import CHOSEN_REFERENCE, REJECTED, REJECTED_REFERENCE
from t5x_like.config.data import DataConfig
from t5x_like.config.objectives import Preference
from t5x_like.data.objectives.examples import Examples
from t5x_like.data.objectives.preference import answer_examples
from t5x_like.data.store.token_store import Split, Store
from t5x_like.data.stream import rng
from t5x_like.data.stream.feature_converters import (
    Features,
    RowIds,
    convert,
    offsets_in_groups,
    put_packed,
    ranges,
    stack_lengths,
)
from t5x_like.data.stream.first_fit import LANES, first_fit, first_fit_in_lanes
from t5x_like.data.stream.packing import WholeExampleRows
from t5x_like.data.stream.packing_planner import DOCUMENTS_PER_PART
from t5x_like.errors import DataError
from t5x_like.utils.type_aliases import IntArray

# Uses of the key. Changing a number changes the data of every seed.
_SHUFFLE, _ORDER, _SHUFFLE_ROWS = range(1, 4)


class PreferenceRows(WholeExampleRows):
    """Preference pairs of one corpus, one per row. Each epoch visits all pairs in an order of its own.

    Attributes:
      num_rows: Number of pairs.
      num_truncated: Number of pairs of which an answer is longer than its row, and is cut.

    Raises:
      DataError: there are no pairs, the store contains no pairs of answers, a prompt is longer than `inputs_length`, or
        the two answers of a pair are equal within the row.
    """

    def __init__(self, store: Store, split: Split, data: DataConfig, objective: Preference, key: rng.Keys):
        if store.sequences_per_document != 3:
            raise DataError(f"{store.path}: found a store without rejected answers, expected preference pairs")
        self._split, self._data, self._objective = split, data, objective
        self._vocabulary = store.vocabulary
        self._shuffle_key = rng.fold_in(key, _SHUFFLE)
        # Three sequences of pair n: bounds 3n, 3n + 1, 3n + 2 and 3n + 3 delimit the prompt and the two answers.
        bounds = split.offsets.astype(np.int64)
        self._bounds_Nx4 = np.stack([bounds[0:-1:3], bounds[1::3], bounds[2::3], bounds[3::3]], axis=1)
        self.num_rows = len(self._bounds_Nx4)
        where = f"{store.path}: {split.name} split"
        if not self.num_rows:
            raise DataError(f"{where}: found no preference pairs, expected some")
        lengths_Nx3 = np.diff(self._bounds_Nx4, axis=1)
        # Dialogues end as their template writes.
        end = 0 if objective.dialogues else 1
        prompt_N = lengths_Nx3[:, 0] + objective.mode_tokens + end
        if too_long := int((prompt_N > data.inputs_length).sum()):
            # A cut prompt may no longer have the answers that were compared.
            raise DataError(
                f"{where}: found {too_long:,} of {self.num_rows:,} prompts longer than the inputs of a row (up to "
                f"{int(prompt_N.max()):,} tokens), expected up to data.inputs_length, {data.inputs_length:,}: "
                f"prompts are not cut; set --data.inputs-length {int(prompt_N.max())}, or leave these pairs out"
            )
        # In a single stream, the answer may fill what the prompt leaves of the row.
        two_rows = len(data.row_positions) == 2
        longest_N = np.full_like(prompt_N, data.targets_length) if two_rows else data.row_length - prompt_N
        self._cut_Nx2 = lengths_Nx3[:, 1:] + end > longest_N[:, None]
        self._answers_Nx2 = np.where(self._cut_Nx2, longest_N[:, None], lengths_Nx3[:, 1:])
        self.num_truncated = int(self._cut_Nx2.any(axis=1).sum())
        # Token positions of the prompt and of each answer.
        self._positions_Nx3 = np.concatenate(
            [prompt_N[:, None], np.minimum(lengths_Nx3[:, 1:] + end, longest_N[:, None])], axis=1
        )
        self._require_different(where)

    @property
    def identity(self) -> Any:
        """JSON value that identifies the layout of a row, for fingerprints."""
        return {"preferences": 1}

    @property
    def positions(self) -> IntArray:
        """[pairs, K]: upper bounds on the token positions of each pair in each of K rows: that of the encoder, if there
        is one, that of the chosen answer and that of the rejected one."""
        if len(self._data.row_positions) == 2:
            return self._positions_Nx3
        return self._positions_Nx3[:, :1] + self._positions_Nx3[:, 1:]

    def put(self, out: Features, row_n: IntArray, pair_n: IntArray) -> None:
        """Write pairs into rows of `out`, one per row. `config.batch_spec` lists the features."""
        data, ids = self._data, RowIds.of(self._vocabulary)
        for prefix, examples in zip(("", REJECTED), self._examples(pair_n), strict=True):
            features = convert(examples, data.layout, data.inputs_length, data.targets_length, ids)
            for name, values in features.items():
                # The prompt of an encoder is written once.
                if prefix + name in out:
                    out[prefix + name][row_n] = values
        for name, values in self._references(pair_n).items():
            out[name][row_n] = values

    def put_packed(self, out: Features, row_n: IntArray, segment_n: IntArray, pair_n: IntArray) -> None:
        """Write pairs into packed rows of `out`, as segments with the given numbers. `row_n` is sorted."""
        data, ids = self._data, RowIds.of(self._vocabulary)
        # The denoiser ids stay at the positions of the chosen answers.
        rejected = {name: out.get(f"{REJECTED}{name}", values) for name, values in out.items()}
        rejected["denoiser_ids"] = out["denoiser_ids"].copy()
        for side, examples in zip((out, rejected), self._examples(pair_n), strict=True):
            lengths = stack_lengths(examples, data.layout)
            offsets = {stack: offsets_in_groups(lengths_n, row_n) for stack, lengths_n in lengths.items()}
            put_packed(side, row_n, segment_n, offsets, examples, data.layout, 0, ids)
        for name, values in self._references(pair_n).items():
            out[name][row_n, segment_n - 1] = values

    def _references(self, pair_n: IntArray) -> Features:
        """Return the log-probabilities of the answers of pairs under the reference."""
        reference = self._split.reference_log_probs
        if reference is None:
            # Rows can be shown but not trained on: a loss that is not a number is refused.
            reference_nx2 = np.full((len(pair_n), 2), np.nan, np.float32)
        else:
            reference_nx2 = reference[pair_n]
        return {CHOSEN_REFERENCE: reference_nx2[:, 0], REJECTED_REFERENCE: reference_nx2[:, 1]}

    def _examples(self, pair_n: IntArray) -> tuple[Examples, Examples]:
        """Return the examples of prompts with their chosen, and with their rejected answers."""
        prompts = [self._split.tokens(*bounds).tolist() for bounds in self._bounds_Nx4[pair_n, :2].tolist()]

        def of_side(side: int) -> Examples:
            pairs = [(prompt, self._answer(pair, side)) for prompt, pair in zip(prompts, pair_n.tolist(), strict=True)]
            return answer_examples(pairs, self._objective, self._vocabulary, self._cut_Nx2[pair_n, side].tolist())

        return of_side(0), of_side(1)

    def _answer(self, pair: int, side: int) -> list[int]:
        start = int(self._bounds_Nx4[pair, 1 + side])
        return list(self._split.tokens(start, start + int(self._answers_Nx2[pair, side])).tolist())

    def _require_different(self, where: str) -> None:
        """Raise DataError if the answers of a pair are equal where both have been cut or have the same ids."""
        same_length = np.flatnonzero(
            (self._answers_Nx2[:, 0] == self._answers_Nx2[:, 1]) & (self._cut_Nx2[:, 0] == self._cut_Nx2[:, 1])
        )
        equal = [pair for pair in same_length.tolist() if self._answer(pair, 0) == self._answer(pair, 1)]
        if equal:
            tokens = int(self._answers_Nx2[equal[0], 0])
            raise DataError(
                f"{where}: found {len(equal):,} of {self.num_rows:,} pairs whose two answers have the same tokens "
                f"within a row, expected a difference: the first is pair {equal[0]:,}, with {tokens:,} tokens; set a "
                "longer --data.targets-length, or leave these pairs out"
            )


class PackedPreferenceRows(WholeExampleRows):
    """Preference pairs of one corpus, several per row, by a first-fit plan of their lengths.

    A row holds the same pairs in each epoch, as segments with the same number in the rows of both answers.

    Attributes:
      num_rows: Rows of an epoch.
      pairs: The pairs.
    """

    def __init__(self, pairs: PreferenceRows, data: DataConfig, objective: Preference, key: rng.Keys):
        self.pairs = pairs
        self._pairs_per_row = objective.pairs_per_row
        self._shuffle_key = rng.fold_in(key, _SHUFFLE_ROWS)
        # Sorting random words gives a random order of the pairs.
        order_N = np.argsort(rng.bits(rng.fold_in(key, _ORDER), 0, pairs.num_rows)[0], kind="stable")
        # The number of pairs is limited like the positions: each takes one of `pairs_per_row`.
        positions = np.concatenate([pairs.positions, np.ones((pairs.num_rows, 1), np.int64)], axis=1)
        *encoder, decoder = data.row_positions.values()
        capacity = (*encoder, decoder, decoder, objective.pairs_per_row)
        self._has_lanes = pairs.num_rows > DOCUMENTS_PER_PART
        row_N = (first_fit_in_lanes if self._has_lanes else first_fit)(positions[order_N], capacity)
        # Pairs of one row become neighbours. The stable sort keeps their order within the row.
        by_row = np.argsort(row_N, kind="stable")
        self._pair_N = order_N[by_row]
        self.num_rows = int(row_N.max()) + 1
        self._first_R = np.searchsorted(row_N[by_row], np.arange(self.num_rows + 1))

    @property
    def identity(self) -> Any:
        """JSON value that identifies the layout of a row, for fingerprints."""
        lanes = {"documents": DOCUMENTS_PER_PART, "lanes": LANES} if self._has_lanes else {}
        return {"preferences": 1, "pairs_per_row": self._pairs_per_row, **lanes}

    @property
    def pairs_per_row(self) -> float:
        """Mean number of pairs of a row."""
        return self.pairs.num_rows / self.num_rows

    def put(self, out: Features, row_n: IntArray, plan_row_n: IntArray) -> None:
        """Write rows of the plan into rows of `out`. `row_n` is sorted."""
        first_n, last_n = self._first_R[plan_row_n], self._first_R[plan_row_n + 1]
        counts_n = last_n - first_n
        rank_m = ranges(counts_n)
        pair_m = self._pair_N[np.repeat(first_n, counts_n) + rank_m]
        self.pairs.put_packed(out, np.repeat(row_n, counts_n), rank_m + 1, pair_m)


def preference_reader(
    store: Store, split: Split, data: DataConfig, objective: Preference, key: rng.Keys
) -> PreferenceRows | PackedPreferenceRows:
    """Return the reader of the training rows of preference pairs."""
    pairs = PreferenceRows(store, split, data, objective, key)
    return pairs if objective.pairs_per_row == 1 else PackedPreferenceRows(pairs, data, objective, key)
