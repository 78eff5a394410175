"""Prompts in the form of an objective's training inputs, and texts with gaps as the objectives fill them."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from t5x_like.config.objectives import Mode
from t5x_like.data.tokenizers.vocabulary import Vocabulary
from t5x_like.errors import DataError


@dataclasses.dataclass(frozen=True)
class InfillQuery:
    """One question to the model about the gaps of a text.

    Attributes:
      ids: Ids of the prompt, without mode token and EOS.
      forced: Tokens that the answer begins with, because they are given in training.
    """

    ids: tuple[int, ...]
    forced: tuple[int, ...] = ()


class InfillFormat(abc.ABC):
    """The way in which an objective presents gaps in a text and fills them.

    Formats of the same class are equal.

    Attributes:
      answer_is_whole_text: True if the model's answer is the complete text instead of the content of the gaps.
    """

    answer_is_whole_text: ClassVar[bool] = False

    @abc.abstractmethod
    def queries(
        self, parts: Sequence[Sequence[int]], numbers: Sequence[int], vocabulary: Vocabulary
    ) -> list[InfillQuery]:
        """Return the queries that ask the model to fill the gaps.

        Args:
          parts: Token ids of the text around the gaps: one part more than there are gaps.
          numbers: Sentinel number of each gap, all different.
          vocabulary: Ids of the sentinels.

        Raises:
          DataError: more gaps than the format supports, or than the vocabulary has sentinels.
        """

    @abc.abstractmethod
    def spans(
        self, answers: Sequence[Sequence[int]], numbers: Sequence[int], vocabulary: Vocabulary
    ) -> list[list[int]]:
        """Return the tokens of each gap from the answers (without EOS) to `queries`; empty if an answer lacks a gap."""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))


class SentinelSpans(InfillFormat):
    """A sentinel in each gap; the answer is each sentinel followed by its span (T5, UL2's R and X)."""

    def queries(
        self, parts: Sequence[Sequence[int]], numbers: Sequence[int], vocabulary: Vocabulary
    ) -> list[InfillQuery]:
        return [InfillQuery(tuple(joined(parts, sentinels(numbers, vocabulary))))]

    def spans(
        self, answers: Sequence[Sequence[int]], numbers: Sequence[int], vocabulary: Vocabulary
    ) -> list[list[int]]:
        return spans_after_sentinels(answers, numbers, vocabulary)


class SeparateBlanks(SentinelSpans):
    """A sentinel in each gap; each span is written after its given sentinel and ended by EOS (GLM).

    GLM's spans come in random order, so that each can come first. Each blank is therefore asked for in a query of its
    own, without the spans of the others.
    """

    def queries(
        self, parts: Sequence[Sequence[int]], numbers: Sequence[int], vocabulary: Vocabulary
    ) -> list[InfillQuery]:
        marks = sentinels(numbers, vocabulary)
        ids = tuple(joined(parts, marks))
        return [InfillQuery(ids, (mark,)) for mark in marks]


class MovedSpans(InfillFormat):
    """A sentinel in each gap; the spans follow the text, each begun by its sentinel (CM3)."""

    def queries(
        self, parts: Sequence[Sequence[int]], numbers: Sequence[int], vocabulary: Vocabulary
    ) -> list[InfillQuery]:
        marks = sentinels(numbers, vocabulary)
        # The sentinel of the first span is given; the model writes the others.
        return [InfillQuery((*joined(parts, marks), marks[0]))]

    def spans(
        self, answers: Sequence[Sequence[int]], numbers: Sequence[int], vocabulary: Vocabulary
    ) -> list[list[int]]:
        first = vocabulary.sentinel_id(numbers[0])
        return spans_after_sentinels([[first, *answer] for answer in answers], numbers, vocabulary)


class MarkedMiddle(InfillFormat):
    """One gap; prefix, suffix and middle each begin with a marker (fill-in-the-middle)."""

    def queries(
        self, parts: Sequence[Sequence[int]], numbers: Sequence[int], vocabulary: Vocabulary
    ) -> list[InfillQuery]:
        if len(numbers) != 1:
            raise DataError(f"found {len(numbers)} gaps, expected one: fill-in-the-middle has one middle")
        prefix_id, suffix_id, middle_id = vocabulary.infilling_ids
        # PSM order: the model continues after the marker of the middle.
        return [InfillQuery((prefix_id, *parts[0], suffix_id, *parts[1], middle_id))]

    def spans(
        self, answers: Sequence[Sequence[int]], numbers: Sequence[int], vocabulary: Vocabulary
    ) -> list[list[int]]:
        return [list(answers[0])]


class WholeText(InfillFormat):
    """The mask token in each gap; the answer is the whole text (BART)."""

    answer_is_whole_text = True

    def queries(
        self, parts: Sequence[Sequence[int]], numbers: Sequence[int], vocabulary: Vocabulary
    ) -> list[InfillQuery]:
        return [InfillQuery(tuple(joined(parts, [vocabulary.mask_id] * len(numbers))))]

    def spans(
        self, answers: Sequence[Sequence[int]], numbers: Sequence[int], vocabulary: Vocabulary
    ) -> list[list[int]]:
        return spans_after_sentinels(answers, numbers, vocabulary)


@dataclasses.dataclass(frozen=True, eq=True)
class MaskTokens(InfillFormat):
    """A number of mask tokens in each gap, each of which becomes one token (masked LM, masked diffusion).

    Attributes:
      per_gap: Number of mask tokens of a gap.
    """

    per_gap: int = 1

    def queries(
        self, parts: Sequence[Sequence[int]], numbers: Sequence[int], vocabulary: Vocabulary
    ) -> list[InfillQuery]:
        ids = list(parts[0])
        for part in parts[1:]:
            ids += [*[vocabulary.mask_id] * self.per_gap, *part]
        return [InfillQuery(tuple(ids))]

    def spans(
        self, answers: Sequence[Sequence[int]], numbers: Sequence[int], vocabulary: Vocabulary
    ) -> list[list[int]]:
        return [list(answers[0][index * self.per_gap : (index + 1) * self.per_gap]) for index in range(len(numbers))]


def sentinels(numbers: Sequence[int], vocabulary: Vocabulary) -> list[int]:
    """Return the sentinel ids of gaps.

    Raises:
      DataError: the vocabulary has fewer sentinels.
    """
    most, count = max(numbers), vocabulary.num_sentinels
    if most >= count:
        raise DataError(f"found <extra_id_{most}>, expected a sentinel below {count}: the vocabulary has {count}")
    return [vocabulary.sentinel_id(number) for number in numbers]


def joined(parts: Sequence[Sequence[int]], marks: Sequence[int]) -> list[int]:
    """Return the parts of a text with a mark in each gap between them."""
    ids = list(parts[0])
    for mark, part in zip(marks, parts[1:], strict=True):
        ids += [mark, *part]
    return ids


def spans_after_sentinels(
    answers: Iterable[Sequence[int]], numbers: Sequence[int], vocabulary: Vocabulary
) -> list[list[int]]:
    """Return for each number the tokens that follow its sentinel; of a repeated sentinel, those of the first."""
    spans: dict[int, list[int]] = {}
    # Tokens before the first sentinel belong to no gap and are dropped with this list.
    current: list[int] = []
    for answer in answers:
        for token in answer:
            if vocabulary.base_size <= token <= vocabulary.first_sentinel_id:
                # `setdefault` keeps the first list of a repeated sentinel; the tokens of a repetition go to a list that
                # nobody reads.
                current = []
                spans.setdefault(vocabulary.first_sentinel_id - token, current)
            else:
                current.append(token)
    return [spans.get(number, []) for number in numbers]


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """Format of an objective's inputs in a layout.

    Attributes:
      mode: Mode token at the beginning; None: no mode token.
      ends_in_eos: True if the prompt is the complete inputs of an objective, closed by EOS; False if it is the
        beginning of a text that the model continues.
      bidirectional: In a single stream, the tokens of the prompt attend to each other in both directions.
      sentinels: True if the targets of the objective contain sentinels.
      infill: The way in which the objective fills gaps in a text; None: it does not.
    """

    mode: Mode | None
    ends_in_eos: bool
    bidirectional: bool
    sentinels: bool
    infill: InfillFormat | None = None

    @property
    def is_masked_text(self) -> bool:
        """True if the answer is filled in at masked positions of the text, and not written after it."""
        return isinstance(self.infill, MaskTokens)

    def ids(self, text: Sequence[int], vocabulary: Vocabulary) -> list[int]:
        """Return the token ids of the prompt, without the BOS token at the start of a decoder's stream."""
        mode = [] if self.mode is None else [vocabulary.mode_id(self.mode)]
        return [*mode, *text, *([vocabulary.eos_id] if self.ends_in_eos else [])]

    def allowed(self, vocabulary: Vocabulary, table_size: int) -> npt.NDArray[np.bool_]:
        """Return a mask [table_size] over the rows of the embedding: True for ids that the targets can contain."""
        # Sentinels follow the text pieces and mode tokens come last, so that one bound separates the ids of targets.
        targets = vocabulary.base_size + (vocabulary.num_sentinels if self.sentinels else 0)
        allowed_V = np.arange(table_size) < targets
        # Where EOS also pads, forbidding the pad id would make it impossible to end the text.
        if vocabulary.pad_id != vocabulary.eos_id:
            allowed_V[vocabulary.pad_id] = False
        return allowed_V


def masked_text_format(per_gap: int = 1) -> PromptFormat:
    """Return the format of texts whose masked tokens are predicted in place, with `per_gap` mask tokens in a gap.

    Such a text is a part of the training text, without tokens around it.
    """
    return PromptFormat(None, ends_in_eos=False, bidirectional=True, sentinels=False, infill=MaskTokens(per_gap))
