"""Scores for people, on a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from t5x_like.evaluation.records import Result, scalars

_SHOWN = ("loss", "perplexity", "accuracy", "tokens")


def tables(result: Result) -> list[Table]:
    """Those of one step."""
    found = []
    if "objectives" in result:
        found += _held_out(result)
    if result.get("tasks"):
        found.append(_tasks(result))
    return found


def _held_out(result: Result) -> list[Table]:
    objectives = Table(title=f"held-out text, step {result['step']:,}")
    objectives.add_column("objective")
    for name in _SHOWN:
        objectives.add_column(name, justify="right")
    for name, scores in result["objectives"].items():
        objectives.add_row(
            name,
            _with_interval(scores["loss"], result, f"loss/{name}"),
            _number(scores.get("perplexity")),
            _percent(scores.get("accuracy")),
            f"{scores['tokens']:,}",
        )
    own = Table(title="what the model reports of itself")
    for name in ("objective", "metric", "mean"):
        own.add_column(name, justify="right" if name == "mean" else "left")
    for name, scores in result["objectives"].items():
        for metric in [metric for metric in scores if metric not in _SHOWN]:
            own.add_row(name, metric, f"{scores[metric]:.4f}")
    found = [objectives, own] if own.row_count else [objectives]
    if result["prefix_lm"] is None:
        return found
    bits = Table(title=f"bits per byte of the same {result['prefix_lm']['bytes']:,} bytes")
    bits.add_column("code")
    bits.add_column("bits", justify="right")
    mean = _with_interval(result["prefix_lm"]["bits_per_byte"], result, "bits_per_byte", digits=3)
    bits.add_row("this model, first half of each window given", mean)
    names = {
        "unigram_bits_per_byte": "token unigram",
        "byte_entropy_bits_per_byte": "byte entropy",
        "gzip_bits_per_byte": "gzip -9",
        "lzma_bits_per_byte": "lzma",
    }
    for key, name in names.items():
        bits.add_row(name, f"{result['baselines'][key]:.3f}")
    return [*found, bits]


def _tasks(result: Result) -> Table:
    table = Table(title=f"Tasks, step {result['step']:,}", caption="\n".join(result.get("notes", ())) or None)
    for name in ("task", "examples", "metric", "value"):
        table.add_column(name, justify="right" if name in ("examples", "value") else "left")
    for name, metrics in result["tasks"].items():
        shown = [metric for metric in metrics if metric != "examples"]
        for place, metric in enumerate(shown or ["-"]):
            first = (name, f"{metrics['examples']:,}") if place == 0 else ("", "")
            value = _with_interval(metrics[metric], result, f"{name}/{metric}") if shown else "-"
            table.add_row(*first, metric, value)
    return table


def beside_each_other(results: Sequence[tuple[str, Result]]) -> Table:
    """All numbers of several checkpoints, a column each."""
    table = Table(title="all of them")
    table.add_column("metric")
    columns = [scalars(result) for _, result in results]
    for name, result in results:
        table.add_column(f"{name}\nstep {result['step']:,}", justify="right")
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(_number(column.get(name)) for column in columns))
    return table


def of_predictions(found: Mapping[str, Any]) -> Table:
    """What `predictions.score_file` returns."""
    signatures = "\n".join(f"{name}: {text}" for name, text in found["signatures"].items())
    table = Table(title=f"{found['file']}: {found['num_examples']:,} examples", caption=signatures or None)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in found["metrics"].items():
        table.add_row(name, _with_interval(value, found, name))
    return table


def _with_interval(value: float, result: Mapping[str, Any], name: str, digits: int = 4) -> str:
    interval = (result.get("intervals") or {}).get(name)
    if interval is None:
        return f"{value:.{digits}f}"
    low, high = interval
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if math.isfinite(value) and abs(value) < 1e5 else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
