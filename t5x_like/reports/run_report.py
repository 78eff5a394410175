"""Run report: report.html, one file without external resources, made from the files of the run directory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pydantic_core
from markupsafe import Markup

from t5x_like.config.objectives import parse_objective
from t5x_like.monitoring.time_tracker import STATES, goodput
from t5x_like.reports.charts import Bar, Chart, Scale, Series, chart, draw, draw_points, series, value_scale
from t5x_like.reports.html_page import content_hash, environment, resource
from t5x_like.reports.run_data import (
    DENOISER,
    RunFiles,
    baseline_values,
    evaluated,
    held_out_mean,
    mapping,
    number,
    read_run,
)
from t5x_like.utils import formatting
from t5x_like.utils.atomic_write import write_atomically
from t5x_like.utils.sanitize import visible

FILE = "report.html"

_PANELS = {
    "learning_rate": ("Learning rate", "number", False),
    "grad_norm": ("Gradient norm", "number", True),
    "tokens_per_second": ("Tokens per second", "count", True),
    "step_time_s": ("Seconds per step", "seconds", True),
    "mfu": ("Model FLOP utilisation", "percent", True),
    "data_wait_fraction": ("Waiting for data", "percent", True),
    "accuracy": ("Token accuracy", "percent", True),
    "z_loss": ("z-loss", "number", True),
    "loss_tokens": ("Loss tokens", "count", True),
    "goodput": ("Goodput", "percent", False),
    "skipped_steps": ("Steps that were not applied", "percent", False),
}
"""Title and unit by metric, and True for noisy metrics, which get a trend line."""
_STATE_WORDS = {
    "init": "start",
    "restore": "restoring",
    "compile": "compilation",
    "data_wait": "waiting for data",
    "step": "training steps",
    "save": "saving",
    "eval": "evaluation",
}


def write_report(run_dir: Path) -> Path:
    """Write report.html into a run directory, from those of the run's files that exist.

    The page executes only its own script, which is allowed by its hash, and loads nothing, so that text of the run
    cannot become code.

    Returns:
      The path of the report.

    Raises:
      FileNotFoundError: `run_dir` is not a directory.
      OSError: the report cannot be written.
    """
    path = run_dir / FILE
    write_atomically(path, render(read_run(run_dir)))
    return path


def render(files: RunFiles) -> str:
    """Return the HTML page."""
    style, script = resource("run_report.css"), resource("run_report.js")
    charts = _charts(files)
    return (
        environment()
        .get_template("run_report.html")
        .render(
            files=files,
            style=Markup(style),
            script=Markup(script),
            style_hash=content_hash(style),
            script_hash=content_hash(script),
            status=_status(files.exit),
            subtitle=_subtitle(files.config),
            figures=_figures(files),
            charts=charts,
            data=[one.data() for group in charts.values() for one in group],
            baselines=_baseline_bars(files.evaluation),
            objectives=_objective_rows(files),
            seconds=_seconds(files.exit),
            config={key: value for key, value in files.config.items() if isinstance(value, Mapping)},
            formats=formatting,
        )
    )


def _status(document: Mapping[str, Any]) -> tuple[str, str]:
    """Return the CSS class and the text of the exit status."""
    if not document:
        return "open", "running, or killed: there is no exit.json"
    reason = visible(str(document.get("reason") or ""))
    code = document.get("code")
    if code == 0:
        return "good", reason or "finished"
    if code == 42:
        return "open", f"{reason or 'stopped'}; the same command resumes"
    return "bad", f"{reason or 'failed'} (exit code {visible(str(code))})"


def _subtitle(config: Mapping[str, Any]) -> str:
    model, data, training = (mapping(config.get(key)) for key in ("model", "data", "training"))
    stacks = {name: mapping(model.get(name)) for name in ("encoder", "decoder") if model.get(name)}
    if not stacks:
        return ""
    kind = (
        "-".join(stacks)
        if len(stacks) == 2
        else {"prefix_lm": "prefix-LM decoder", "causal_lm": "causal decoder"}.get(
            str(data.get("layout")), next(iter(stacks))
        )
    )
    first = next(iter(stacks.values()))
    corpus = mapping(data.get("corpus"))
    source = corpus.get("tfds") or corpus.get("task") or (" ".join(corpus.get("files") or ()) or "python_docs")
    optimizer = mapping(training.get("optimizer")).get("kind", "")
    words = [
        kind,
        " + ".join(str(stack.get("num_layers")) for stack in stacks.values()) + " layers",
        f"d_model {first.get('d_model')}",
        f"vocabulary {formatting.number(number(model.get('vocab_size')), 6)}",
        f"batch {training.get('global_batch_size')} of {data.get('inputs_length')}/{data.get('targets_length')}",
        str(optimizer),
        f"corpus {source}",
    ]
    return visible(", ".join(word for word in words if word))


def _figures(files: RunFiles) -> list[tuple[str, str, str]]:
    """Return (label, value, detail) of the key figures."""
    figures: list[tuple[str, str, str]] = []
    losses = series(files.records, "loss").finite
    if len(files.records):
        total = mapping(files.config.get("training")).get("num_train_steps")
        figures.append(("Steps", f"{files.records[-1]['step']:,}", f"of {total:,}" if isinstance(total, int) else ""))
    if len(losses):
        first, last = formatting.number(losses.values[0]), formatting.number(losses.values[-1])
        figures.append(("Training loss", last, f"from {first} at step {int(losses.steps[0]):,}"))
    bits, unit = number(mapping(files.evaluation.get("prefix_lm")).get("bits_per_byte")), "bits per byte"
    if not math.isfinite(bits):
        bits = number(mapping(files.evaluation.get("diffusion_bound")).get("bits_per_byte"))
        unit = "bits per byte at most"
    if math.isfinite(bits):
        gzip = number(mapping(files.evaluation.get("baselines")).get("gzip_bits_per_byte"))
        detail = f"{unit}, gzip {formatting.number(gzip, 3)}" if math.isfinite(gzip) else unit
        figures.append(("Held-out text", formatting.number(bits, 3), detail))
    speed = series(files.records, "tokens_per_second").finite
    if len(speed):
        use = series(files.records, "mfu").finite
        detail = f"MFU {formatting.percent(float(np.median(use.values)))}" if len(use) else "median"
        figures.append(("Tokens per second", formatting.count(float(np.median(speed.values))), detail))
    seconds = mapping(files.exit.get("seconds"))
    spent = {state: number(value) for state, value in seconds.items() if 0 < number(value) < math.inf}
    if spent:
        detail = f"{formatting.percent(goodput(spent))} in training steps"
        figures.append(("Wall clock", formatting.duration(sum(spent.values())), detail))
    return figures


def _charts(files: RunFiles) -> dict[str, list[Chart]]:
    """Return the charts by section; all share the x axis."""
    steps = [record["step"] for record in (*files.records, *files.evaluations)]
    last = float(max(steps, default=1))
    x = Scale(0.0, last if last > 0 else 1.0)
    return {
        "loss": _loss_charts(files, x),
        "denoisers": _denoiser_charts(files, x),
        "bits": _bits_charts(files, x),
        "tasks": _task_charts(files, x),
        "optimization": _metric_charts(files, x),
    }


def _loss_charts(files: RunFiles, x: Scale) -> list[Chart]:
    training, held_out = series(files.records, "loss"), held_out_mean(files)
    if not len(training) and not len(held_out):
        return []
    y = value_scale([training, held_out])
    lines = [draw(training, "training", "training", x, y)]
    note = "cross-entropy per loss token in nats, by step"
    if len(held_out):
        lines.append(draw_points(held_out, "held-out", "held-out", x, y))
    return [chart("loss", "Loss of the mixture", lines, x, y, note=note, css="wide", tick_count=5)]


def _denoiser_charts(files: RunFiles, x: Scale) -> list[Chart]:
    """Return one small chart per denoiser, on one scale, so that they can be compared."""
    training = {name: series(files.records, DENOISER + name) for name in files.objectives}
    held_out = {name: evaluated(files, "objectives", name, "loss") for name in files.objectives}
    y = value_scale([*training.values(), *held_out.values()])
    charts: list[Chart] = []
    for name, objective in files.objectives.items():
        if not len(training[name]) and not len(held_out[name]):
            continue
        css = f"mode-{objective['mode']}" if objective.get("mode") in ("R", "S", "X") else "mode-none"
        lines = [draw(training[name], "training", "training", x, y)]
        if len(held_out[name]):
            lines.append(draw_points(held_out[name], "held-out", "held-out", x, y))
        key, note = f"denoiser-{len(charts)}", describe_objective(objective)
        charts.append(chart(key, visible(name), lines, x, y, note=note, css=css))
    return charts if len(charts) > 1 else []  # one objective alone is the mixture


def describe_objective(objective: Mapping[str, Any]) -> str:
    """Return a short description of an objective of config.json; an empty string if it cannot be read."""
    try:
        return parse_objective(objective).description
    except pydantic_core.ValidationError:
        return ""


def _bits_charts(files: RunFiles, x: Scale) -> list[Chart]:
    bits, title = evaluated(files, "prefix_lm", "bits_per_byte"), "Bits per byte over training"
    if len(bits) < 2:
        bits = evaluated(files, "diffusion_bound", "bits_per_byte")
        title = "Bits per byte over training (upper bound)"
    if len(bits) < 2:
        return []
    gzip = number(mapping(files.evaluation.get("baselines")).get("gzip_bits_per_byte"))
    references = {"gzip": gzip} if math.isfinite(gzip) else {}
    around = Series("references", np.zeros(len(references)), np.array(list(references.values())))
    y = value_scale([bits, around])
    lines = [draw_points(bits, "held-out", "held-out", x, y)]
    return [chart("bits", title, lines, x, y, css="wide short", references=references)]


def _task_charts(files: RunFiles, x: Scale) -> list[Chart]:
    """Return a small chart for each metric of the seqio Tasks, by evaluation."""
    names = dict.fromkeys(
        (str(task), str(metric))
        for evaluation in files.evaluations
        for task, metrics in mapping(evaluation.get("tasks")).items()
        for metric in mapping(metrics)
        if metric != "examples"
    )
    charts: list[Chart] = []
    for task, metric in names:
        curve = evaluated(files, "tasks", task, metric)
        if not len(curve.finite):
            continue
        y = value_scale([curve])
        line = draw_points(curve, metric, "held-out", x, y)
        charts.append(chart(f"task-{len(charts)}", visible(metric), [line], x, y, note=visible(task), css="mode-none"))
    return charts


def _metric_charts(files: RunFiles, x: Scale) -> list[Chart]:
    """Return charts of the known metrics in their order, then of all other metrics of the records."""
    names = dict.fromkeys(name for record in files.records for name in record)
    others = [name for name in names if name not in {"step", "loss", *_PANELS} and not name.startswith(DENOISER)]
    charts: list[Chart] = []
    for name in (*(name for name in _PANELS if name in names), *others):
        curve = series(files.records, name)
        if not len(curve):
            continue
        title, unit, noisy = _PANELS.get(name, (visible(name), "number", True))
        y = value_scale([curve], from_zero=unit != "number")
        line = draw(curve, title, "training", x, y, noisy=noisy)
        charts.append(chart(f"metric-{len(charts)}", title, [line], x, y, unit=unit, css="mode-none"))
    return charts


def _baseline_bars(evaluation: Mapping[str, Any]) -> list[Bar]:
    found = baseline_values(evaluation)
    longest = max((value for _, value, _ in found), default=1.0) or 1.0
    return [
        Bar(label, formatting.number(value, 3), 100 * value / longest, "model" if is_own else "")
        for label, value, is_own in found
    ]


def _objective_rows(files: RunFiles) -> list[dict[str, str]]:
    """Return the rows of the table of the newest evaluation, in the order of the mixture."""
    evaluated = mapping(files.evaluation.get("objectives"))
    rows = []
    for name in (*(name for name in files.objectives if name in evaluated), *(set(evaluated) - set(files.objectives))):
        found, objective = mapping(evaluated[name]), files.objectives.get(name, {})
        loss, accuracy, tokens = (number(found.get(key)) for key in ("loss", "accuracy", "tokens"))
        perplexity = number(found.get("perplexity"))
        rows.append(
            {
                "name": visible(name),
                "description": describe_objective(objective),
                "css": f"mode-{objective.get('mode')}" if objective.get("mode") in ("R", "S", "X") else "mode-none",
                "loss": formatting.number(loss),
                "perplexity": formatting.number(perplexity) if math.isfinite(perplexity) else "–",
                "accuracy": formatting.percent(accuracy),
                "tokens": f"{tokens:,.0f}" if math.isfinite(tokens) else "–",
            }
        )
    return rows


def _seconds(document: Mapping[str, Any]) -> list[Bar]:
    """Return the wall-clock time by state, in descending order."""
    seconds = mapping(document.get("seconds"))
    found = {state: number(seconds.get(state)) for state in STATES}
    found = {state: value for state, value in found.items() if 0 < value < math.inf}
    total = sum(found.values())
    return [
        Bar(_STATE_WORDS[state], formatting.duration(value), 100 * value / total, f"state-{state}")
        for state, value in sorted(found.items(), key=lambda item: -item[1])
    ]
