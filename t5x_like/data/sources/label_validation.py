"""Validation of the rows of a corpus of pairs: the kind of the targets, two answers, or hard negatives."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
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


def validate_negatives(
    inputs: str, text: str, negatives: Sequence[str], config: CorpusConfig, where: Callable[[], str]
) -> None:
    """Check the hard negatives of a pair of texts that match.

    Raises:
      DataError: there are more than the configuration allows, or one of them is the text that matches, or the inputs.
    """
    fields = ", ".join(map(repr, config.negative_fields))
    if len(negatives) > config.max_negatives:
        raise DataError(
            f"{where()}: found {len(negatives)} hard negatives in {fields}, expected at most {config.max_negatives}; "
            f"set --data.corpus.num-negatives {len(negatives)}"
        )
    for other, name in ((text, config.text_field), (inputs, config.inputs_field)):
        if other in negatives:
            raise DataError(
                f"{where()}: found the text of {name!r}, {other[:80]!r}, among the hard negatives in {fields}, "
                "expected texts that do not match"
            )


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
