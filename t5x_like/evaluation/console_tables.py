"""Tables of evaluation results for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from t5x_like.evaluation.results_store import (
    BITS_BOUND,
    BITS_OF_CONTINUATION,
    CONTINUATION,
    DIFFUSION_BOUND,
    Result,
    scalars,
)

_SHOWN = ("loss", "perplexity", "accuracy", "tokens")
_MOST_COLUMNS = 3
"""Checkpoints that have a column each in a terminal of 80 characters."""


def result_tables(result: Result) -> list[Table]:
    """Return the tables of one step."""
    shown = []
    if "objectives" in result:
        shown += _held_out(result)
    if result.get("tasks"):
        shown.append(_tasks(result))
    return shown


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
    model_metrics = Table(title="metrics that the model reports")
    for name in ("objective", "metric", "mean"):
        model_metrics.add_column(name, justify="right" if name == "mean" else "left")
    for name, scores in result["objectives"].items():
        for metric in [metric for metric in scores if metric not in _SHOWN]:
            model_metrics.add_row(name, metric, f"{scores[metric]:.4f}")
    shown = [objectives, model_metrics] if model_metrics.row_count else [objectives]
    bound = result.get(DIFFUSION_BOUND)
    scores = bound or result["prefix_lm"]
    if CONTINUATION in result:
        shown.append(_continuation(result))
    if scores is None:
        return shown
    bits = Table(title=f"bits per byte of the same {scores['bytes']:,} bytes")
    bits.add_column("code")
    bits.add_column("bits", justify="right")
    name = BITS_BOUND if bound else "bits_per_byte"
    of_model = (
        "this model, given the first half: upper bound" if bound else "this model, given the first half of each window"
    )
    bits.add_row(of_model, _with_interval(scores["bits_per_byte"], result, name, digits=3))
    names = {
        "unigram_bits_per_byte": "token unigram",
        "byte_entropy_bits_per_byte": "byte entropy",
        "gzip_bits_per_byte": "gzip -9",
        "lzma_bits_per_byte": "lzma",
    }
    for key, name in names.items():
        bits.add_row(name, f"{result['baselines'][key]:.3f}")
    return [*shown, bits]


def _continuation(result: Result) -> Table:
    scores = result[CONTINUATION]
    table = Table(title=f"bits per byte of {scores['scored']:,} tokens after {scores['given']:,} given ones")
    for name in ("model", "bits", "windows", "digest of the windows"):
        table.add_column(name, justify="right" if name in ("bits", "windows") else "left")
    bits = _with_interval(scores["bits_per_byte"], result, BITS_OF_CONTINUATION, digits=3)
    of_model = "this model: upper bound" if scores["is_bound"] else "this model"
    table.add_row(of_model, bits, f"{scores['windows']:,}", scores["digest"])
    return table


def _tasks(result: Result) -> Table:
    table = Table(title=f"Tasks, step {result['step']:,}", caption="\n".join(result.get("notes", ())) or None)
    for name in ("task", "examples", "metric", "value"):
        table.add_column(name, justify="right" if name in ("examples", "value") else "left")
    for name, metrics in result["tasks"].items():
        shown = [metric for metric in metrics if metric != "examples"]
        for index, metric in enumerate(shown or ["-"]):
            first = (name, f"{metrics['examples']:,}") if index == 0 else ("", "")
            value = _with_interval(metrics[metric], result, f"{name}/{metric}") if shown else "-"
            table.add_row(*first, metric, value)
    return table


def comparison_table(results: Sequence[tuple[str, Result]]) -> Table:
    """Return a table of all metrics of several checkpoints: with a column for each of a few, with rows for many."""
    table = Table(title="all checkpoints")
    table.add_column("metric")
    columns = [scalars(result) for _, result in results]
    metrics = dict.fromkeys(name for column in columns for name in column)
    if len(results) > _MOST_COLUMNS:
        table.add_column("checkpoint", overflow="fold")
        for name in ("step", "value"):
            table.add_column(name, justify="right", no_wrap=True)
        for metric in metrics:
            for number, ((name, result), column) in enumerate(zip(results, columns, strict=True)):
                table.add_row("" if number else metric, name, f"{result['step']:,}", _number(column.get(metric)))
            table.add_section()
        return table
    for name, result in results:
        table.add_column(f"{name}\nstep {result['step']:,}", justify="right")
    for metric in metrics:
        table.add_row(metric, *(_number(column.get(metric)) for column in columns))
    return table


def predictions_table(scores: Mapping[str, Any]) -> Table:
    """Return a table of the metrics of `score_predictions.score_rows`."""
    signatures = "\n".join(f"{name}: {text}" for name, text in scores["signatures"].items())
    table = Table(title=f"{scores['file']}: {scores['num_examples']:,} examples", caption=signatures or None)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in scores["metrics"].items():
        table.add_row(name, _with_interval(value, scores, name))
    return table


def pairs_table(scores: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of the results of `minimal_pairs.score_pairs` on one file."""
    first = scores[0]
    table = Table(title=f"{first['file']}: {first['num_pairs']:,} minimal pairs")
    for name in ("model", "step", "score of a text", "accuracy", "mean difference (nats)"):
        table.add_column(name, justify="left" if name in ("model", "score of a text") else "right")
    for one in scores:
        interval = one["interval"]
        share = _percent(one["accuracy"])
        shown = share if interval is None else f"{share} [{_percent(interval[0])}, {_percent(interval[1])}]"
        kind = one["scoring"].replace("_", " ")
        table.add_row(one["model"], f"{one['step']:,}", kind, shown, f"{one['mean_difference']:.3f}")
    return table


def positions_table(scores: Mapping[str, Any]) -> Table:
    """Return a table of the result of `position_losses.position_scores`."""
    table = Table(title=f"{scores['model']}, step {scores['step']:,}: loss by position (nats per token)")
    bins = sorted({(one["first"], one["last"]) for found in scores["objectives"].values() for one in found})
    table.add_column("positions")
    for name in scores["objectives"]:
        table.add_column(name, justify="right")
    for first, last in bins:
        cells = []
        for found in scores["objectives"].values():
            loss = next((one["loss"] for one in found if (one["first"], one["last"]) == (first, last)), None)
            cells.append(_number(loss))
        table.add_row(f"{first:,}" if first == last else f"{first:,} to {last:,}", *cells)
    return table


def retrieval_table(scores: Mapping[str, Any]) -> Table:
    """Return a table of the result of `retrieval.score_retrieval`: a row for each length, a column for each depth."""
    kind = scores["scoring"].replace("_", " ")
    table = Table(
        title=f"{scores['model']}, step {scores['step']:,}: retrieval by {kind}",
        caption=f"{scores['num_examples']} examples per cell, chance {_percent(scores['chance'])}",
    )
    depths = sorted({cell["depth"] for cell in scores["cells"]})
    table.add_column("characters", justify="right")
    for depth in depths:
        table.add_column(f"depth {depth:g}", justify="right")
    for length in dict.fromkeys(cell["length"] for cell in scores["cells"]):
        by_depth = {cell["depth"]: cell for cell in scores["cells"] if cell["length"] == length}
        shown = []
        for depth in depths:
            share, interval = _percent(by_depth[depth]["accuracy"]), by_depth[depth]["interval"]
            shown.append(share if interval is None else f"{share} [{_percent(interval[0])}, {_percent(interval[1])}]")
        table.add_row(f"{length:,}", *shown)
    return table


def confusion_table(confusion: Mapping[str, Any]) -> Table:
    """Return a table of `calibration.confusion`."""
    table = Table(title="true labels (rows) by predicted labels (columns)")
    table.add_column("")
    for label in confusion["labels"]:
        table.add_column(label, justify="right")
    for label, counts in zip(confusion["labels"], confusion["counts"], strict=True):
        table.add_row(label, *(f"{count:,}" for count in counts))
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
