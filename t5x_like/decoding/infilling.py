"""Text with gaps, filled in the form that the model was trained on, and put together again. Knows no jax.

A gap is written `<mask>`, or `<extra_id_K>` where its number matters; the two are not mixed in one text.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from t5x_like.config import DataError
from t5x_like.decoding.prompts import PromptFormat
from t5x_like.decoding.spelling import Speller, is_lossless

MASK = "<mask>"
_GAP = re.compile(r"<mask>|<extra_id_(\d{1,6})>")


@dataclasses.dataclass(frozen=True)
class Gapped:
    """A text cut at its gaps.

    Attributes:
      parts: What stands around the gaps: one more than there are gaps.
      numbers: Of the gaps' sentinels.
    """

    parts: tuple[str, ...]
    numbers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Query:
    """What the model is asked.

    Attributes:
      ids: The prompt, as `PromptFormat.ids` makes one.
      forced: Tokens that the answer begins with, as they are given in training.
    """

    ids: tuple[int, ...]
    forced: tuple[int, ...] = ()


def gapped(text: str) -> Gapped | None:
    """The text at its gaps; None if it has none.

    Raises:
      DataError: both kinds of gaps, or two of the same number.
    """
    found = list(_GAP.finditer(text))
    if not found:
        return None
    numbered = [match[1] for match in found if match[1] is not None]
    if numbered and len(numbered) < len(found):
        raise DataError(f"found {MASK} beside <extra_id_{numbered[0]}>, expected gaps of one kind")
    numbers = tuple(map(int, numbered)) or tuple(range(len(found)))
    if len(set(numbers)) < len(numbers):
        raise DataError("found two gaps with the same <extra_id_N>, expected each once")
    ends = [0, *(match.end() for match in found)]
    starts = [*(match.start() for match in found), len(text)]
    return Gapped(tuple(text[end:start] for end, start in zip(ends, starts, strict=True)), numbers)


def queries(text: Gapped, form: PromptFormat, tokenizer: Speller) -> list[Query]:
    """What to ask the model so that it fills the gaps: one query, or with blanks one for each gap.

    GLM's spans come in random order, so that each can come first: each blank is asked for by itself, without the
    spans of the others.

    Raises:
      DataError: more gaps than the form has, or than the vocabulary has sentinels.
    """
    vocabulary = tokenizer.vocabulary
    parts = [tokenizer.encode(part) if part else [] for part in text.parts]
    if form.gaps == "middle":
        if len(text.numbers) != 1:
            raise DataError(f"found {len(text.numbers)} gaps, expected one: fill-in-the-middle has one middle")
        prefix_id, suffix_id, middle_id = vocabulary.infilling_ids
        return [Query(tuple(form.ids([prefix_id, *parts[0], suffix_id, *parts[1], middle_id], vocabulary)))]
    most = max(text.numbers)
    if form.gaps != "whole" and most >= vocabulary.num_sentinels:
        count = vocabulary.num_sentinels
        raise DataError(f"found <extra_id_{most}>, expected a sentinel below {count}: the vocabulary has {count}")
    marks = [vocabulary.mask_id if form.gaps == "whole" else vocabulary.sentinel_id(k) for k in text.numbers]
    joined = list(parts[0])
    for mark, part in zip(marks, parts[1:], strict=True):
        joined += [mark, *part]
    if form.gaps == "moved":
        # The first span's sentinel is given; the others the model says itself.
        return [Query(tuple(form.ids([*joined, marks[0]], vocabulary)))]
    ids = tuple(form.ids(joined, vocabulary))
    if form.gaps == "blanks":
        return [Query(ids, (mark,)) for mark in marks]
    return [Query(ids)]


def spans(answers: Sequence[Sequence[int]], text: Gapped, form: PromptFormat, tokenizer: Speller) -> list[list[int]]:
    """The tokens for each gap out of the answers to `queries`; empty where the model says nothing for it.

    Args:
      answers: Tokens without EOS, of each query.
    """
    if form.gaps == "middle":
        return [list(answers[0])]
    first = tokenizer.vocabulary.first_sentinel_id
    begun = [first - text.numbers[0]] if form.gaps == "moved" else []
    found: dict[int, list[int]] = {}
    current: list[int] = []
    for answer in answers:
        for token in (*begun, *answer):
            if tokenizer.vocabulary.base_size <= token <= first:
                # Of a sentinel that is repeated the first counts.
                current = []
                found.setdefault(first - token, current)
            else:
                current.append(token)
    return [found.get(number, []) for number in text.numbers]


def span_texts(tokens: Sequence[Sequence[int]], tokenizer: Speller) -> list[str]:
    """The text of each span, with the space that it may begin with."""
    return [tokenizer.to_bytes(span).decode("utf-8", errors="replace") for span in tokens]


def filled(text: Gapped, texts: Sequence[str], tokenizer: Speller) -> str:
    """The text with its gaps filled.

    A tokenizer that puts a space before each word has no other way to say that a word begins: where the text before the
    gap ends in a space, that one is left out.
    """
    adds_spaces = not is_lossless(tokenizer)
    whole = text.parts[0]
    for span, part in zip(texts, text.parts[1:], strict=True):
        if adds_spaces and (not whole or whole[-1].isspace()):
            span = span.removeprefix(" ")
        whole += span + part
    return whole
