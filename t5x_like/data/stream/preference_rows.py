"""Rows of preference pairs: each row holds a prompt with the chosen answer, and the prompt with the rejected one."""

from __future__ import annotations

from typing import Any

import numpy as np

from t5x_like.config.batch_spec import CHOSEN_REFERENCE, REJECTED, REJECTED_REFERENCE
from t5x_like.config.data import DataConfig
from t5x_like.config.objectives import Preference
from t5x_like.data.objectives.preference import answer_examples
from t5x_like.data.store.token_store import Split, Store
from t5x_like.data.stream import rng
from t5x_like.data.stream.feature_converters import Features, RowIds, convert
from t5x_like.data.stream.packing import WholeExampleRows
from t5x_like.errors import DataError
from t5x_like.utils.type_aliases import IntArray

_SHUFFLE = 1


class PreferenceRows(WholeExampleRows):
    """Rows of preference pairs of one corpus. Each epoch visits all pairs in an order of its own.

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
        self._require_different(where)

    @property
    def identity(self) -> Any:
        """JSON value that identifies the layout of a row, for fingerprints."""
        return {"preferences": 1}

    def put(self, out: Features, row_n: IntArray, pair_n: IntArray) -> None:
        """Write pairs into rows of `out`, one per row. `config.batch_spec` lists the features."""
        data, ids = self._data, RowIds.of(self._vocabulary)
        prompts = [self._split.tokens(*bounds).tolist() for bounds in self._bounds_Nx4[pair_n, :2].tolist()]
        for side, prefix in enumerate(("", REJECTED)):
            pairs = [(prompt, self._answer(pair, side)) for prompt, pair in zip(prompts, pair_n.tolist(), strict=True)]
            examples = answer_examples(pairs, self._objective, self._vocabulary, self._cut_Nx2[pair_n, side].tolist())
            features = convert(examples, data.layout, data.inputs_length, data.targets_length, ids)
            for name, values in features.items():
                # The prompt of an encoder is written once.
                if prefix + name in out:
                    out[prefix + name][row_n] = values
        reference = self._split.reference_log_probs
        for side, name in enumerate((CHOSEN_REFERENCE, REJECTED_REFERENCE)):
            # Without a reference, rows can be shown but not trained on: a loss that is not a number is refused.
            out[name][row_n] = np.nan if reference is None else reference[pair_n, side]

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
