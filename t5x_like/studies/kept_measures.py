"""Measures of finished runs, kept in a JSON file of the run directory, so that a page made again has the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from t5x_like.errors import DataError
from t5x_like.evaluation.comparison import EvaluatedCheckpoint
from t5x_like.evaluation.results_store import write_json
from t5x_like.utils.json_reader import read_json


def measure_once(
    run: EvaluatedCheckpoint, file: str, name: str, measure: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """Return the scores that are kept for a checkpoint; without them, measure and keep them.

    Args:
      run: The checkpoint.
      file: Name of the file in its run directory.
      name: Name of the measure, different for each measure with other settings.
      measure: Returns its scores by name.

    Raises:
      DataError: the file is damaged.
    """
    path = run.path / file
    found = _kept(path)
    key = f"{name} at step {run.step}"
    if key not in found:
        found[key] = measure()
        write_json(path, found)
    return found[key]


def _kept(path: Path) -> dict[str, dict[str, float]]:
    """Return what the file of a run has, by name; nothing if there is no file."""
    try:
        found = read_json(path) if path.exists() else {}
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
        for name, scores in found.items():
            if not isinstance(scores, dict) or not all(isinstance(one, int | float) for one in scores.values()):
                raise ValueError(f"no numbers by name for {name!r}")
    except ValueError as error:
        expected = "a JSON object with the measures of the run"
        raise DataError(
            f"{path}: found unusable content ({error}), expected {expected}; delete the file to measure again"
        ) from None
    return found
