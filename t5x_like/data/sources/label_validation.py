"""Validation of the targets of a corpus of pairs: any text, a label, one label per word, a number, or two answers."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import assert_never

from t5x_like.config.corpus import CorpusConfig
from t5x_like.data.chat.messages import equal_answers
from t5x_like.errors import DataError


def validate_target(text: str, inputs: str | None, config: CorpusConfig, where: Callable[[], str]) -> None:
    """Check the targets of a pair.

    Args:
      text: The targets.
      inputs: The inputs of the same pair.
      config: Configuration of the corpus, which defines the kind of the targets.
      where: Returns the location of the pair, for the message.

    Raises:
      DataError: a label is not listed, the number of labels differs from the number of words, or the text is not a
        finite number.
    """
    field = config.text_field
    match config.target_kind:
        case "text":
            pass
        case "label":
            _validate_label(text, config, where)
        case "token_labels":
            labels, words = text.split(), (inputs or "").encode().split()
            if len(labels) != len(words):
                raise DataError(
                    f"{where()}: found {len(labels)} labels in {field!r} for {len(words)} words, expected one for each"
                )
            for label in labels:
                _validate_label(label, config, where)
        case "number":
            try:
                is_finite = math.isfinite(float(text))
            except ValueError:
                is_finite = False
            if not is_finite:
                raise DataError(f"{where()}: found {text[:80]!r} in {field!r}, expected a finite number")
        case _:
            assert_never(config.target_kind)


def validate_preference(
    prompt: str, chosen: str, rejected: str, config: CorpusConfig, where: Callable[[], str]
) -> None:
    """Check a preference pair.

    Args:
      prompt, chosen, rejected: Texts of the pair.
      config: Configuration of the corpus, which names the fields.
      where: Returns the location of the pair, for the message.

    Raises:
      DataError: a text is empty, or the answers are equal.
    """
    texts = {config.inputs_field: prompt, config.text_field: chosen, config.rejected_field: rejected}
    for field, text in texts.items():
        if not text.strip():
            raise DataError(f"{where()}: found no text in {field!r}, expected a prompt and two answers")
    if chosen == rejected:
        raise DataError(equal_answers(chosen, config, where))


def _validate_label(label: str, config: CorpusConfig, where: Callable[[], str]) -> None:
    if label in config.labels:
        return
    matches = difflib.get_close_matches(label, config.labels, n=1)
    listed = ", ".join(map(repr, config.labels[:20])) + (", ..." if len(config.labels) > 20 else "")
    hint = f" (perhaps {matches[0]!r})" if matches else ""
    raise DataError(
        f"{where()}: found the label {label[:80]!r} in {config.text_field!r}{hint}, expected one of "
        f"data.corpus.labels: {listed}"
    )
