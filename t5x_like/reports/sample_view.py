"""Decoded samples, split into text, sentinels and mode tokens, to show masked spans and their predictions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from t5x_like.utils.sanitize import visible

_SENTINEL = re.compile(r"<extra_id_(\d{1,6})>")
_MODE = re.compile(r"\s*\[(R|S|X|NLU|NLG|S2S)\]")


@dataclasses.dataclass(frozen=True)
class Piece:
    """Part of a sample.

    Attributes:
      number: Number of a sentinel.
      marked: Highlight the text: a predicted span that equals the target's, or a scored token.
    """

    kind: Literal["text", "sentinel", "mode", "special"]
    text: str
    number: int = 0
    marked: bool = False


@dataclasses.dataclass(frozen=True)
class Sample:
    denoiser: str
    inputs: tuple[Piece, ...]
    targets: tuple[Piece, ...]
    prediction: tuple[Piece, ...]
    spans: int
    """Number of masked spans in the targets; 0 if the objective has no sentinels."""
    right_spans: int


def pieces(text: str) -> tuple[Piece, ...]:
    """Split a decoded row at its sentinels. A mode token is recognized at the start only.

    Names such as `<unk>` and `</s>` are text: tokenizers leave pad and EOS out of decoded text and write unknown text
    as U+2047, so that these names come from the text itself.
    """
    found: list[Piece] = []
    start = 0
    mode = _MODE.match(text)
    if mode:
        found.append(Piece("mode", mode.group(1)))
        start = mode.end()
    for match in _SENTINEL.finditer(text, start):
        if match.start() > start:
            found.append(Piece("text", visible(text[start : match.start()])))
        found.append(Piece("sentinel", match.group(), int(match.group(1))))
        start = match.end()
    if start < len(text):
        found.append(Piece("text", visible(text[start:])))
    return tuple(found)


def sample(document: Mapping[str, Any]) -> Sample:
    """Return the view of an entry of samples.json: {"denoiser", "inputs", "targets", "prediction"}."""
    text = {name: str(document.get(name, "")) for name in ("denoiser", "inputs", "targets", "prediction")}
    targets, prediction = pieces(text["targets"]), pieces(text["prediction"])
    expected, found = _spans(targets), _spans(prediction)
    right = {number for number, span in expected.items() if span and found.get(number) == span}
    return Sample(
        denoiser=visible(text["denoiser"]),
        inputs=pieces(text["inputs"]),
        targets=targets,
        prediction=_marked(prediction, right),
        spans=len(expected),
        right_spans=len(right),
    )


def _spans(row: tuple[Piece, ...]) -> dict[int, str]:
    """Return the text after each sentinel; for a repeated sentinel, after its first occurrence."""
    spans: dict[int, str] = {}
    current: int | None = None
    for piece in row:
        if piece.kind == "sentinel":
            current = None if piece.number in spans else piece.number
            if current is not None:
                spans[current] = ""
        elif piece.kind == "text" and current is not None:
            spans[current] += piece.text
    return {number: span.strip() for number, span in spans.items()}


def _marked(row: tuple[Piece, ...], right: set[int]) -> tuple[Piece, ...]:
    marked: list[Piece] = []
    current: int | None = None
    seen: set[int] = set()
    for piece in row:
        if piece.kind == "sentinel":
            current = None if piece.number in seen else piece.number
            seen.add(piece.number)
        is_right = piece.kind == "text" and current in right
        marked.append(dataclasses.replace(piece, marked=is_right))
    return tuple(marked)
