"""What the targets of a corpus of pairs may be: any text, a label, labels of words, or a number."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable

from t5x_like.config.corpora import CorpusConfig
from t5x_like.config.errors import DataError


def require_target(text: str, inputs: str | None, config: CorpusConfig, where: Callable[[], str]) -> None:
    """Checks the targets of a pair.

    Args:
      text: The targets.
      inputs: The text that they are of.
      config: Says what they are to be.
      where: The pair's place, for the message.

    Raises:
      DataError: a label that is not listed, labels that are not as many as the words, or no number.
    """
    field = config.text_field
    match config.target_kind:
        case "label":
            _require_label(text, config, where)
        case "token_labels":
            labels, words = text.split(), (inputs or "").encode().split()
            if len(labels) != len(words):
                raise DataError(
                    f"{where()}: found {len(labels)} labels in {field!r} for {len(words)} words, expected one for each"
                )
            for label in labels:
                _require_label(label, config, where)
        case "number":
            try:
                finite = math.isfinite(float(text))
            except ValueError:
                finite = False
            if not finite:
                raise DataError(f"{where()}: found {text[:80]!r} in {field!r}, expected a finite number")


def _require_label(label: str, config: CorpusConfig, where: Callable[[], str]) -> None:
    if label in config.labels:
        return
    near = difflib.get_close_matches(label, config.labels, n=1)
    shown = ", ".join(map(repr, config.labels[:20])) + (", ..." if len(config.labels) > 20 else "")
    hint = f" (perhaps {near[0]!r})" if near else ""
    raise DataError(
        f"{where()}: found the label {label[:80]!r} in {config.text_field!r}{hint}, expected one of "
        f"data.corpus.labels: {shown}"
    )
