"""Metrics of predictions that lie in a file: `t5x-like eval --predictions FILE --metrics squad,bleu`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t5x_like.config.errors import ConfigError, DataError, Problem
from t5x_like.evaluation import bootstrap
from t5x_like.evaluation.metrics import METRICS, MetricFn, number_of, signature

TARGET_FIELDS = ("target", "targets", "answers", "reference", "references")
PREDICTION_FIELDS = ("prediction", "output")
_NUMBERS = ("f1", "pearson", "spearman")


def require_metrics(names: Sequence[str]) -> dict[str, MetricFn]:
    """The functions of these names.

    Raises:
      ConfigError: a name that is none.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        expected = f"names out of {', '.join(METRICS)}, separated by commas"
        raise ConfigError([Problem("--metrics", ", ".join(unknown) or "none", expected)])
    return {name: METRICS[name] for name in names}


def score_file(
    path: Path,
    names: Sequence[str],
    *,
    target_field: str | None = None,
    prediction_field: str | None = None,
    draws: int = bootstrap.DRAWS,
) -> dict[str, Any]:
    """Scores the rows of a file of JSON lines.

    Args:
      names: Of `metrics.METRICS`.
      target_field: A text, a number, or a list of either; None: the first of `TARGET_FIELDS` that the first row has.
      prediction_field: A text or a number; None: the first of `PREDICTION_FIELDS`.

    Returns:
      file, num_examples, metrics {"squad/em": value}, intervals {name: (low, high) or None}, signatures of sacreBLEU.

    Raises:
      ConfigError, DataError: a wrong name, or a row without one of the fields; the line is named.
    """
    functions = require_metrics(names)
    rows = _rows(path)
    targets_of = _field(rows, target_field, TARGET_FIELDS, path)
    predictions_of = _field(rows, prediction_field, PREDICTION_FIELDS, path)
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float] | None] = {}
    signatures: dict[str, str] = {}
    for name, function in functions.items():
        targets = [_value(row, targets_of, name, path, is_target=True) for row in rows]
        predictions = [_value(row, predictions_of, name, path, is_target=False) for row in rows]
        try:
            found = function(targets, predictions)
        except (AttributeError, TypeError, ValueError) as error:
            raise DataError(f"{path}: {name} cannot score these values: {error}") from None
        if (text := signature(name, targets, predictions)) is not None:
            signatures[name] = text
        metrics |= {f"{name}/{key}": value for key, value in found.items()}
        drawn = bootstrap.of_metric(function, targets, predictions, count=draws)
        intervals |= {f"{name}/{key}": bootstrap.interval(drawn.get(key, [])) for key in found}
    return {
        "file": str(path),
        "num_examples": len(rows),
        "metrics": metrics,
        "intervals": intervals,
        "signatures": signatures,
    }


def _rows(path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: unreadable ({error}), expected a file of JSON lines in UTF-8") from None
    rows: list[tuple[int, Mapping[str, Any]]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: found no JSON ({error}), expected an object") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: found a JSON {type(row).__name__}, expected an object")
        rows.append((number, row))
    if not rows:
        raise DataError(f"{path}: found no rows, expected JSON lines with a target and a prediction")
    return rows


def _field(rows: Sequence[tuple[int, Mapping[str, Any]]], named: str | None, usual: Sequence[str], path: Path) -> str:
    candidates = [named] if named else usual
    for name in candidates:
        if name in rows[0][1]:
            return name
    option = "--target-field" if usual is TARGET_FIELDS else "--prediction-field"
    found = ", ".join(map(repr, rows[0][1])) or "none"
    raise DataError(
        f"{path}:{rows[0][0]}: found the fields {found}, expected {' or '.join(map(repr, candidates))}; "
        f"name it by {option}"
    )


def _value(row: tuple[int, Mapping[str, Any]], field: str, metric: str, path: Path, *, is_target: bool) -> Any:
    number, fields = row
    value = fields.get(field)
    if value is None or isinstance(value, dict):
        raise DataError(f"{path}:{number}: found {value!r} in {field!r}, expected a text, a number or a list of them")
    if metric not in _NUMBERS or not isinstance(value, str):
        return value
    # A target must be a number; what a model says instead of one is wrong, as in T5's tasks.
    found = number_of(value, default=float("nan") if is_target else -1.0)
    if found != found:
        raise DataError(f"{path}:{number}: found {value!r} in {field!r}, expected a number for the metric {metric}")
    return found
