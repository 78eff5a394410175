"""Metrics of predictions in a file: `t5x-like eval --predictions FILE --metrics squad,bleu`.

"confusion" is not a metric but a table, which is returned beside the metrics.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t5x_like.errors import ConfigError, ConfigProblem, DataError
from t5x_like.evaluation import bootstrap
from t5x_like.evaluation.calibration import confusion
from t5x_like.evaluation.text_metrics import METRICS, MetricFn, bleu_of, number_of, signature
from t5x_like.utils.json_reader import parse_json

TARGET_FIELDS = ("target", "targets", "answers", "reference", "references")
PREDICTION_FIELDS = ("prediction", "output")
_NUMBERS = ("f1", "pearson", "spearman")
_PROBABILITIES = {"calibration": "probabilities"}
"""Metrics of the probabilities of labels, and the field that holds them."""
CONFUSION = "confusion"
"""Name of the table of true against predicted labels."""
Rows = Sequence[tuple[str, Mapping[str, Any]]]
"""(location, fields) of each row."""


def require_metrics(names: Sequence[str]) -> dict[str, MetricFn]:
    """Return the metric functions with these names, without the table "confusion".

    `bleu:13a` names `bleu` with a tokenization of sacreBLEU.

    Raises:
      ConfigError: a name is unknown, or there are no names.
    """
    bleus = {name: bleu_of(name.removeprefix("bleu:")) for name in names if name.startswith("bleu:")}
    unknown = [name for name in names if name not in METRICS and name not in bleus and name != CONFUSION]
    if unknown or not names:
        known = (*METRICS, CONFUSION)
        near = [close for name in unknown for close in difflib.get_close_matches(name, known, n=1)]
        expected = f"names from {', '.join(known)}, or of a --plugin FILE, separated by commas"
        fix = f"perhaps {', '.join(near)}" if near else ""
        raise ConfigError([ConfigProblem("--metrics", ", ".join(unknown) or "none", expected, fix)])
    return {name: bleus.get(name) or METRICS[name] for name in names if name != CONFUSION}


def score_file(
    path: Path,
    names: Sequence[str],
    *,
    target_field: str | None = None,
    prediction_field: str | None = None,
    draws: int = bootstrap.DRAWS,
) -> dict[str, Any]:
    """Score the rows of a file of JSON lines; see `score_rows`."""
    require_metrics(names)
    rows = json_lines(path, "a target and a prediction")
    return score_rows(str(path), rows, names, target_field=target_field, prediction_field=prediction_field, draws=draws)


def score_rows(
    source: str,
    rows: Rows,
    names: Sequence[str],
    *,
    target_field: str | None = None,
    prediction_field: str | None = None,
    draws: int = bootstrap.DRAWS,
) -> dict[str, Any]:
    """Score rows.

    Args:
      source: Name of the file, for messages.
      rows: Rows with a target and a prediction; at least one.
      names: Names of `text_metrics.METRICS`, and "confusion".
      target_field: Field with a text, a number, or a list of either; None: the first of `TARGET_FIELDS` that the first
        row has.
      prediction_field: Field with a text or a number; None: the first of `PREDICTION_FIELDS` that the first row has.
        Metrics of probabilities read the field "probabilities".
      draws: Number of bootstrap draws.

    Returns:
      file, num_examples, metrics {"squad/em": value}, intervals {name: (low, high) or None}, signatures of sacreBLEU,
      and, if it is asked for, confusion (see `calibration.confusion`).

    Raises:
      ConfigError: a metric is unknown.
      DataError: a row does not have the fields, or its values cannot be scored; the message names the line.
    """
    functions = require_metrics(names)
    targets_of = _field(rows, target_field, TARGET_FIELDS)
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float] | None] = {}
    signatures: dict[str, str] = {}
    tables: dict[str, Any] = {}
    for name in names:
        own_field = _PROBABILITIES.get(name, prediction_field)
        predictions_of = _field(rows, own_field, PREDICTION_FIELDS)
        targets = [_value(row, targets_of, name, is_target=True) for row in rows]
        predictions = [_value(row, predictions_of, name, is_target=False) for row in rows]
        if name == CONFUSION:
            tables[CONFUSION] = confusion(targets, predictions)
            continue
        function = functions[name]
        try:
            values = function(targets, predictions)
        except (AttributeError, TypeError, ValueError) as error:
            raise DataError(f"{source}: {name} cannot score these values: {error}{_lists(rows, targets)}") from None
        if (text := signature(name, targets, predictions)) is not None:
            signatures[name] = text
        metrics |= {f"{name}/{key}": value for key, value in values.items()}
        drawn = bootstrap.metric_draws(function, targets, predictions, count=draws)
        intervals |= {f"{name}/{key}": bootstrap.interval(drawn.get(key, [])) for key in values}
    return {
        "file": source,
        "num_examples": len(rows),
        "metrics": metrics,
        "intervals": intervals,
        "signatures": signatures,
        **tables,
    }


def _lists(rows: Rows, targets: Sequence[Any]) -> str:
    """Return which target is a list, for the message of a metric that may expect a text; nothing if none is."""
    where = next((row[0] for row, target in zip(rows, targets, strict=True) if isinstance(target, list)), None)
    if where is None:
        return ""
    return (
        f"; the target in {where} is a list: name a field with one value by --target-field, or let the metric read "
        "`text_metrics.references(target)`"
    )


def json_lines(path: Path, content: str) -> Rows:
    """Return (location, fields) of the JSON objects of a file, one per line that is not blank.

    Args:
      content: What each line should have, for the message about an empty file.

    Raises:
      DataError: the file cannot be read, a line is not a JSON object, or there are none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}), expected a file of JSON lines in UTF-8") from None
    rows: list[tuple[str, Mapping[str, Any]]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: found invalid JSON ({error}), expected an object") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: found a JSON {type(row).__name__}, expected an object")
        rows.append((f"{path}:{number}", row))
    if not rows:
        raise DataError(f"{path}: found no rows, expected JSON lines with {content}")
    return rows


def _field(rows: Rows, field: str | None, defaults: Sequence[str]) -> str:
    candidates = [field] if field else defaults
    for name in candidates:
        if name in rows[0][1]:
            return name
    option = "--target-field" if defaults is TARGET_FIELDS else "--prediction-field"
    found = ", ".join(map(repr, rows[0][1])) or "none"
    raise DataError(
        f"{rows[0][0]}: found the fields {found}, expected {' or '.join(map(repr, candidates))}; "
        f"name the field by {option}"
    )


def _value(row: tuple[str, Mapping[str, Any]], field: str, metric: str, *, is_target: bool) -> Any:
    where, fields = row
    value = fields.get(field)
    if metric in _PROBABILITIES and not is_target:
        if isinstance(value, dict) and value and all(isinstance(p, int | float) for p in value.values()):
            return value
        raise DataError(f"{where}: found {value!r} in {field!r}, expected an object of probabilities by label")
    if value is None or isinstance(value, dict):
        raise DataError(f"{where}: found {value!r} in {field!r}, expected a text, a number or a list of them")
    if metric not in _NUMBERS or not isinstance(value, str):
        return value
    # A target must be a number. A prediction that is not a number counts as wrong, as in T5's tasks.
    parsed = number_of(value, default=float("nan") if is_target else -1.0)
    if math.isnan(parsed):
        raise DataError(f"{where}: found {value!r} in {field!r}, expected a number for the metric {metric}")
    return parsed
