"""Rows of labelled examples: each document of a store is a row, a text with its label or the texts that match it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, assert_never

import numpy as np
import numpy.typing as npt

from t5x_like.config.batch_spec import POSITIVE, negative, negative_weights
from t5x_like.config.data import DataConfig
from t5x_like.config.layouts import StackName
from t5x_like.config.objectives import LabeledExamples, Mode
from t5x_like.data.store.token_store import Split, Store
from t5x_like.data.stream import rng
from t5x_like.data.stream.feature_converters import Features
from t5x_like.data.stream.packing import WholeExampleRows
from t5x_like.data.tokenizers.vocabulary import Vocabulary
from t5x_like.errors import DataError
from t5x_like.utils.type_aliases import IntArray

_SHUFFLE = 1


class LabeledRows(WholeExampleRows):
    """Rows of labelled examples of one corpus. Each epoch visits all pairs in an order of its own.

    Attributes:
      num_rows: Number of examples.
      num_truncated: Number of examples with a text that is longer than a row, and is cut.

    Raises:
      DataError: there are no examples, or the store contains text without labels.
    """

    def __init__(self, store: Store, split: Split, data: DataConfig, objective: LabeledExamples, key: rng.Keys):
        self._num_negatives = data.sources[0].corpus.max_negatives
        self._parts = 2 + self._num_negatives
        if store.sequences_per_document != self._parts:
            raise DataError(
                f"{store.path}: found {store.sequences_per_document} texts in a document, expected {self._parts}: "
                "text and label, or a text, the one that matches it, and the hard negatives"
            )
        self._split, self._objective = split, objective
        self._shuffle_key = rng.fold_in(key, _SHUFFLE)
        self._labels = data.sources[0].corpus.labels
        self._tokenizer = store.tokenizer
        self._stack = data.target_stack
        self._vocabulary = store.vocabulary
        self._prefix = text_prefix(store.vocabulary, self._stack, objective.mode)
        self._max_text = data.row_length - len(self._prefix) - 1  # EOS.
        self._length = data.row_length
        self._bounds = split.offsets.astype(np.int64)
        self.num_rows = (len(self._bounds) - 1) // self._parts
        if not self.num_rows:
            raise DataError(f"{store.path}: found no labelled examples in its {split.name} split, expected some")
        lengths_NxP = np.diff(self._bounds)[: self.num_rows * self._parts].reshape(-1, self._parts)
        texts_NxP = lengths_NxP if objective.kind == "embedding" else lengths_NxP[:, :1]
        self.num_truncated = int((texts_NxP > self._max_text).any(axis=1).sum())
        # Labels are stored as token ids in the store. Comparing ids avoids decoding each one.
        self._by_tokens = {tuple(self._tokenizer.encode(label)): i for i, label in enumerate(self._labels)}
        # A tokenizer that lower-cases, or splits at punctuation, returns "b - per" for "B-PER".
        self._by_spelling = {_spelling(self._tokenizer.decode(ids)): i for ids, i in self._by_tokens.items()}
        if len(self._by_spelling) < len(self._labels):
            raise DataError(
                f"{store.path}: found {len(self._labels)} labels with {len(self._by_spelling)} spellings under the "
                "tokenizer, expected one for each: it may lower-case, or have no piece for them; rename them"
            )

    @property
    def identity(self) -> Any:
        """JSON value that identifies the layout of a text, for fingerprints."""
        return {"start": True} if self._stack == "encoder" and self._vocabulary.start_id in self._prefix[:1] else False

    def put(self, out: Features, row_n: IntArray, pair_n: IntArray) -> None:
        """Write pairs into rows of `out`, one per row. `config.batch_spec` lists the features."""
        tokens = f"{self._stack}_input_tokens"
        for row, pair in zip(row_n.tolist(), pair_n.tolist(), strict=True):
            # Of pairs, bounds 2 i, 2 i + 1 and 2 i + 2 delimit text and label. Hard negatives follow them.
            first, middle, last, *ends = self._bounds[self._parts * pair : self._parts * (pair + 1) + 1].tolist()
            text = self._text_tokens(first, middle)
            self._put_text(out[tokens][row], text)
            if "decoder_causal_attention" in out:
                out["decoder_causal_attention"][row, : len(text)] = 1
            if self._objective.kind == "embedding":
                self._put_text(out[POSITIVE][row], self._text_tokens(middle, last))
                out["label_weights"][row] = 1
                for number, (start, stop) in enumerate(itertools.pairwise([last, *ends]), start=1):
                    # A row without this negative has an empty text of weight 0.
                    self._put_text(out[negative(number)][row], self._text_tokens(start, stop))
                    out[negative_weights(number)][row] = stop > start
            else:
                self._put_label(out, row, text, self._split.tokens(middle, last))

    def _put_text(self, out_L: npt.NDArray[Any], text: list[int]) -> None:
        out_L[:] = self._vocabulary.pad_id
        out_L[: len(text)] = text

    def _text_tokens(self, start: int, stop: int) -> list[int]:
        """Return the ids of a text as the model reads them. A decoder reads its start id first, as in training."""
        return [
            *self._prefix,
            *self._split.tokens(start, min(stop, start + self._max_text)).tolist(),
            self._vocabulary.eos_id,
        ]

    def _put_label(self, out: Features, row: int, text: list[int], targets: npt.NDArray[np.integer]) -> None:
        match self._objective.kind:
            case "classification":
                out["labels"][row] = self._by_tokens[tuple(targets.tolist())]
                out["label_weights"][row] = 1
            case "regression":
                out["labels"][row] = float(_spelling(self._tokenizer.decode(targets)))
                out["label_weights"][row] = 1
            case "token_classification":
                labels = self._word_labels(self._tokenizer.decode(targets))
                positions = self._label_positions(row_text=text, num_labels=len(labels))
                # Words that were truncated have no position.
                labels = labels[: len(positions)]
                out["labels"][row, positions] = labels
                out["label_weights"][row, positions] = 1
            case "embedding":
                raise ValueError("embedding examples have a positive text, not a label")
            case _:
                assert_never(self._objective.kind)

    def _word_labels(self, text: str) -> list[int]:
        """Return the indices of labels in their order. The tokenizer may have changed the spaces between them."""
        names = text.split()
        if all(name in self._labels for name in names):
            return [self._labels.index(name) for name in names]
        return split_labels(text, self._by_spelling)

    def _label_positions(self, row_text: list[int], num_labels: int) -> list[int]:
        """Return the positions of the first tokens of the words, without those that are truncated.

        Raises:
          DataError: the pieces do not show where the words begin.
        """
        first = len(self._prefix)
        starts = [first + position for position in self._tokenizer.word_starts_of(row_text[first:-1])]
        is_truncated = len(row_text) == self._length
        if len(starts) > num_labels or (len(starts) < num_labels and not is_truncated):
            raise DataError(
                f"found a text of {num_labels} labelled words in which the tokenizer begins {len(starts)} words, "
                "expected equal numbers: WordPiece splits words at punctuation; choose a tokenizer of kind "
                "sentencepiece, bpe or bytes"
            )
        return starts


def split_labels(text: str, by_spelling: Mapping[str, int]) -> list[int]:
    """Return the labels that a text consists of, whatever the spaces between them.

    Args:
      text: Decoded labels.
      by_spelling: Index of each label by its spelling without spaces.

    Raises:
      DataError: the text is no sequence of these labels, or more than one.
    """
    rest = _spelling(text)
    # From the end on: the number of sequences that spell the rest of the text, up to 2, and the first label of one.
    ways, first = [*[0] * len(rest), 1], {}
    for start in reversed(range(len(rest))):
        for spelling, label in by_spelling.items():
            stop = start + len(spelling)
            if spelling and rest.startswith(spelling, start) and ways[stop]:
                ways[start] = min(2, ways[start] + ways[stop])
                first[start] = label, stop
    if ways[0] != 1:
        found = f"{'several sequences' if ways[0] else 'no sequence'} of {', '.join(by_spelling)}"
        raise DataError(f"found {text!r}, which is {found}, as the tokenizer decodes word labels; rename the labels")
    labels, start = [], 0
    while start < len(rest):
        label, start = first[start]
        labels.append(label)
    return labels


def _spelling(text: str) -> str:
    """Return a decoded label or number without spaces, which a tokenizer may put between its pieces."""
    return "".join(text.split())


def text_prefix(vocabulary: Vocabulary, stack: StackName, mode: Mode | None) -> list[int]:
    """Return the ids in front of a text: the start id and the mode token.

    A decoder reads its text shifted by one, after its start id. An encoder begins with the token that its tokenizer has
    for that, [CLS] of a BERT, whose state pooling `cls` reads.
    """
    start = [vocabulary.start_id] if stack == "decoder" or vocabulary.has_start else []
    return start if mode is None else [*start, vocabulary.mode_id(mode)]


def label_text(labels: npt.NDArray[Any], weights: npt.NDArray[Any], names: Sequence[str]) -> str:
    """Return the label of a row as text: the name of its class, the names of its words' classes, or its number."""
    if not names:
        return f"{float(labels):g}"
    return " ".join(names[int(label)] for label in labels[weights > 0]) if labels.ndim else names[int(labels)]
