"""Labelled examples: a pair of a store is a row, its inputs the text and its targets what a head is to say of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like.config.data import DataConfig
from t5x_like.config.errors import DataError
from t5x_like.config.objectives import Labelled
from t5x_like.data import keys as rng
from t5x_like.data.features import Features
from t5x_like.data.store import Split, Store
from t5x_like.data.vocabulary import EOS_ID
from t5x_like.data.whole_rows import Integers, WholeRows

_SHUFFLE = 1


class LabelledRows(WholeRows):
    """The rows of one corpus. Every epoch visits all pairs in an order of its own.

    Attributes:
      num_rows: Pairs.
      cut: Of them, those whose text is longer than a row.

    Raises:
      DataError: there are none, or the store is of text without labels.
    """

    def __init__(self, store: Store, split: Split, data: DataConfig, objective: Labelled, key: rng.Keys):
        if store.parts != 2:
            raise DataError(f"{store.path}: found a store of text, expected pairs of a text and its label")
        self._split, self._objective = split, objective
        self._shuffle_key = rng.fold_in(key, _SHUFFLE)
        self._labels = data.sources[0].corpus.labels
        self._tokenizer = store.tokenizer
        self._is_decoder = data.layout != "encoder"
        self._prefix = [0] * self._is_decoder
        if objective.mode is not None:
            self._prefix.append(store.vocabulary.mode_id(objective.mode))
        self._room = data.row_length - len(self._prefix) - 1
        self._length = data.row_length
        self._bounds = split.offsets.astype(np.int64)
        self.num_rows = (len(self._bounds) - 1) // 2
        if not self.num_rows:
            raise DataError(f"{store.path}: found no labelled examples in its {split.name} split, expected some")
        self.cut = int((np.diff(self._bounds)[::2] > self._room).sum())
        self._by_tokens = {tuple(self._tokenizer.encode(label)): i for i, label in enumerate(self._labels)}

    def put(self, out: Features, row_n: Integers, pair_n: Integers) -> None:
        """Writes pairs into rows of `out`, which hold nothing else. For the features see `config.batch`."""
        tokens = "decoder_input_tokens" if self._is_decoder else "encoder_input_tokens"
        for row, pair in zip(row_n.tolist(), pair_n.tolist(), strict=True):
            first, middle, last = self._bounds[2 * pair : 2 * pair + 3].tolist()
            text = self._cells(first, middle)
            out[tokens][row, : len(text)] = text
            if "decoder_causal_attention" in out:
                out["decoder_causal_attention"][row, : len(text)] = 1
            if self._objective.kind == "embedding":
                other = self._cells(middle, last)
                out["positive_input_tokens"][row, : len(other)] = other
                out["label_weights"][row] = 1
            else:
                self._label(out, row, text, self._split.tokens(middle, last))

    def _cells(self, start: int, stop: int) -> list[int]:
        """A text's cells. A decoder reads id 0 first, as in training on text."""
        return [*self._prefix, *self._split.tokens(start, min(stop, start + self._room)).tolist(), EOS_ID]

    def _label(self, out: Features, row: int, text: list[int], targets: npt.NDArray[np.integer]) -> None:
        match self._objective.kind:
            case "classification":
                out["labels"][row] = self._by_tokens[tuple(targets.tolist())]
                out["label_weights"][row] = 1
            case "regression":
                out["labels"][row] = float(self._tokenizer.decode(targets))
                out["label_weights"][row] = 1
            case _:
                places = self._word_starts(text)
                labels = [self._labels.index(label) for label in self._tokenizer.decode(targets).split()]
                # Words that were cut off have no place.
                places, labels = places[: len(labels)], labels[: len(places)]
                out["labels"][row, places] = labels
                out["label_weights"][row, places] = 1

    def _word_starts(self, text: list[int]) -> list[int]:
        """Cells in which a word begins: those with the first byte behind white space."""
        found, inside = [], False
        for place in range(len(self._prefix), len(text) - 1):
            piece = self._tokenizer.to_bytes([text[place]])
            # A piece can end one word and begin another only if it has a space inside, which vocabularies avoid.
            words = piece.split()
            if words and (not inside or piece[:1].isspace()):
                found.append(place)
            if piece:
                inside = bool(words) and not piece[-1:].isspace()
        return found


def label_text(labels: npt.NDArray[Any], weights: npt.NDArray[Any], names: Sequence[str]) -> str:
    """Labels of a row for people: the name of its class, those of its words with spaces between, or its number."""
    if not names:
        return f"{float(labels):g}"
    return " ".join(names[int(label)] for label in labels[weights > 0]) if labels.ndim else names[int(labels)]
