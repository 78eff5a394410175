"""Infilling: texts with gaps become prompts in the form of training, and the answers are put into the gaps.

A gap is written `<mask>`, or `<extra_id_K>` if its sentinel number matters; the two are not mixed in one text.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from t5x_like.data.objectives.prompts import InfillFormat, PromptFormat
from t5x_like.data.tokenizers.tokenizer import TokenizerProtocol, is_lossless
from t5x_like.errors import DataError

MASK = "<mask>"
_GAP = re.compile(r"<mask>|<extra_id_(\d{1,6})>")


@dataclasses.dataclass(frozen=True)
class GappedText:
    """A text that is split at its gaps.

    Attributes:
      parts: The text around the gaps: one part more than there are gaps.
      numbers: Sentinel number of each gap.
    """

    parts: tuple[str, ...]
    numbers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Query:
    """A prompt for the model.

    Attributes:
      ids: Token ids of the prompt, as `PromptFormat.ids` returns them.
      forced: Tokens that the answer begins with, because they are given in training.
    """

    ids: tuple[int, ...]
    forced: tuple[int, ...] = ()


def split_at_gaps(text: str) -> GappedText | None:
    """Split a text at its gaps; return None if it has none.

    Raises:
      DataError: both kinds of gaps, or two gaps with the same number.
    """
    matches = list(_GAP.finditer(text))
    if not matches:
        return None
    numbered = [match[1] for match in matches if match[1] is not None]
    # Numbers for the gaps without one could collide with the given ones.
    if numbered and len(numbered) < len(matches):
        raise DataError(f"found {MASK} beside <extra_id_{numbered[0]}>, expected gaps of one kind")
    numbers = tuple(map(int, numbered)) or tuple(range(len(matches)))
    if len(set(numbers)) < len(numbers):
        raise DataError("found two gaps with the same <extra_id_N>, expected each once")
    ends = [0, *(match.end() for match in matches)]
    starts = [*(match.start() for match in matches), len(text)]
    return GappedText(tuple(text[end:start] for end, start in zip(ends, starts, strict=True)), numbers)


def queries(text: GappedText, form: PromptFormat, tokenizer: TokenizerProtocol) -> list[Query]:
    """Return the prompts that make the model fill the gaps: one, or for GLM's blanks one per gap.

    Raises:
      DataError: more gaps than the format supports, or than the vocabulary has sentinels.
    """
    vocabulary = tokenizer.vocabulary
    # Part by part, as training cuts tokens: a piece never spans a gap.
    parts = [tokenizer.encode(part) if part else [] for part in text.parts]
    return [
        Query(tuple(form.ids(query.ids, vocabulary)), query.forced)
        for query in _infill(form).queries(parts, text.numbers, vocabulary)
    ]


def spans(
    answers: Sequence[Sequence[int]], text: GappedText, form: PromptFormat, tokenizer: TokenizerProtocol
) -> list[list[int]]:
    """Return the tokens of each gap from the answers to `queries`; empty if the model wrote nothing for a gap.

    Args:
      answers: Tokens of the answer to each query, without EOS.
      text: The text with gaps.
      form: Format of the queries.
      tokenizer: Tokenizer of the model.
    """
    return _infill(form).spans(answers, text.numbers, tokenizer.vocabulary)


def _infill(form: PromptFormat) -> InfillFormat:
    assert form.infill is not None, "the format fills no gaps"
    return form.infill


def span_texts(tokens: Sequence[Sequence[int]], tokenizer: TokenizerProtocol) -> list[str]:
    """Return the text of each span, including a space at its beginning."""
    return [tokenizer.to_bytes(span).decode("utf-8", errors="replace") for span in tokens]


def filled(text: GappedText, texts: Sequence[str], tokenizer: TokenizerProtocol) -> str:
    """Return the text with its gaps filled.

    A tokenizer that puts a space before each word cannot express the beginning of a word otherwise. Where the text
    before the gap ends in a space, the space of the span is therefore removed.
    """
    adds_spaces = not is_lossless(tokenizer)
    whole = text.parts[0]
    for span, part in zip(texts, text.parts[1:], strict=True):
        if adds_spaces and (not whole or whole[-1].isspace()):
            span = span.removeprefix(" ")
        whole += span + part
    return whole
