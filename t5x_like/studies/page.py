"""Page of a study, one HTML file: expectations, arms, curves, differences, and what they leave open."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
from markupsafe import Markup

from t5x_like import run_directory
from t5x_like.evaluation.comparison import lower_is_better
from t5x_like.evaluation.results_store import CONTINUATION, read_evaluations, scalars
from t5x_like.reports.charts import Chart, Line, Scale, Series, chart, dots, path, value_scale
from t5x_like.reports.html_page import content_hash, environment, resource
from t5x_like.studies.plan import ArmCost, arm_cost, arm_differences
from t5x_like.studies.results import FEWEST_SEEDS, Estimate, Results, differs, verdict
from t5x_like.studies.study import Prediction, Study, StudyRun
from t5x_like.utils import formatting
from t5x_like.utils.json_reader import read_json

_COLORS = 8
_AXES = (
    ("executed", "FLOPs executed", "executed"),
    ("loss", "Loss tokens", "loss_tokens"),
    ("raw", "Raw tokens", "raw_tokens"),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """Row of a table of scores: texts of value, interval and seeds, and whether it differs from 0."""

    arm: str
    css: str
    value: str
    around: str
    seeds: str
    verdict: str = ""


def render(title: str, study: Study, runs: Sequence[StudyRun], results: Results, command: str) -> str:
    """Return the page.

    Args:
      title: Name of the study.
      study: The study, whose first arm the differences are taken from.
      runs: All runs of the study, those without results included.
      results: What was measured.
      command: Command that makes the page again.
    """
    style = resource("run_report.css") + resource("comparison.css") + resource("study.css")
    first_of = {run.arm: run.run for run in reversed(runs)}
    order = [arm.name for arm in study.arms if arm.name in first_of]
    costs = {name: arm_cost(first_of[name]) for name in order}
    base = next((name for name in order if name in results.arms), order[0])
    summaries = [one.name for one in study.summaries]
    of_summaries = dict.fromkeys(name for one in results.summaries.values() for name in one.values)
    further = [*study.also, *(one.name for one in study.steps_to), *of_summaries]
    return (
        environment()
        .get_template("study.html")
        .render(
            title=title,
            study=study,
            style=Markup(style),
            style_hash=content_hash(style),
            status=_status(runs, results),
            predictions=[_expectation(one, results) for one in study.predictions],
            fewest_seeds=FEWEST_SEEDS,
            arms=[(name, _css(order, name), _cost_texts(costs[name])) for name in order],
            differences=arm_differences(sorted(runs, key=lambda run: order.index(run.arm))),
            charts=_charts(study, runs, results, costs, order),
            measure=results.measure,
            lower=lower_is_better(results.measure),
            base=base,
            scores=_scores(results, order, None, results.measure),
            compared=_scores(results, [name for name in order if name != base], base, results.measure, order),
            also=[(name, _scores(results, [*order, *summaries], None, name)) for name in further],
            windows=_windows(results),
            command=command,
            machine=_machine(results),
        )
    )


def _css(order: Sequence[str], arm: str) -> str:
    return f"s{order.index(arm) % _COLORS}"


def _status(runs: Sequence[StudyRun], results: Results) -> str:
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    shown = f"seeds {', '.join(map(str, seeds))}" if seeds else "one seed"
    return f"{len(results.runs)} of {len(runs)} runs have results; {shown}"


def _expectation(prediction: Prediction, results: Results) -> Mapping[str, str]:
    estimate = results.predicted(prediction)
    found = verdict(prediction, estimate)
    sign = "/" if prediction.is_ratio else "−"
    subject = prediction.arm if prediction.than is None else f"{prediction.arm} {sign} {prediction.than}"
    return {
        "claim": prediction.claim,
        "source": prediction.source,
        "range": f"{subject} {_range(prediction.low, prediction.high)}",
        "value": "no result"
        if estimate is None
        else _value(estimate, signed=sign == "−" and prediction.than is not None),
        "around": "" if estimate is None else _around(estimate),
        "verdict": found or "no verdict",
        "css": {"held": "better", "failed": "worse"}.get(found or "", "absent"),
    }


def _range(low: float, high: float) -> str:
    if math.isinf(high):
        return f"at least {low:.4g}"
    return f"at most {high:.4g}" if math.isinf(low) else f"from {low:.4g} to {high:.4g}"


def _value(estimate: Estimate, *, signed: bool) -> str:
    side = f"{estimate.side} " if estimate.side else ""
    return f"{side}{estimate.value:+.4f}" if signed else f"{side}{formatting.number(estimate.value)}"


def _around(estimate: Estimate) -> str:
    return "" if estimate.interval is None else f"{estimate.interval[0]:.4g} to {estimate.interval[1]:.4g}"


def _scores(
    results: Results, arms: Sequence[str], than: str | None, name: str, order: Sequence[str] | None = None
) -> list[Row]:
    rows = []
    for arm in arms:
        estimate = results.compared(arm, than, name)
        if estimate is None:
            continue
        word = ""
        if than is not None and differs(estimate):
            word = "better" if (estimate.value < 0) == lower_is_better(name) else "worse"
        rows.append(
            Row(
                arm,
                _css(order or arms, arm),
                _value(estimate, signed=than is not None),
                _around(estimate),
                "; ".join(map(formatting.number, estimate.by_seed)),
                word,
            )
        )
    return rows


def _cost_texts(cost: ArmCost) -> list[str]:
    return [
        formatting.count(cost.parameters),
        f"{cost.steps:,}",
        formatting.flops(cost.executed),
        formatting.flops(cost.model),
        formatting.count(cost.raw_tokens),
        formatting.count(cost.loss_tokens),
    ]


def _charts(
    study: Study, runs: Sequence[StudyRun], results: Results, costs: Mapping[str, ArmCost], order: Sequence[str]
) -> list[Chart]:
    """Return the score against FLOPs, loss tokens and raw tokens: seeds thin, their mean thick."""
    curves = {
        (run.arm, run.seed): _curve(results.runs[run.arm, run.seed].path, results.measure)
        for run in runs
        if (run.arm, run.seed) in results.runs
    }
    if not any(len(curve) for curve in curves.values()):
        return []
    y = value_scale([curve for curve in curves.values() if len(curve)])
    found = []
    for key, title, field in _AXES:
        per_step = {arm: getattr(cost, field) / cost.steps for arm, cost in costs.items()}
        most = max(
            (per_step[arm] * float(curve.steps[-1]) for (arm, _), curve in curves.items() if len(curve)), default=0
        )
        if not most:
            continue
        x = Scale(0.0, most)
        lines = []
        for arm in order:
            scaled = [
                Series(arm, curve.steps * per_step[arm], curve.values)
                for (name, _), curve in curves.items()
                if name == arm and len(curve)
            ]
            if scaled:
                lines.append(_line(arm, _css(order, arm), scaled, x, y))
        made = chart(key, title, lines, x, y, note=results.measure, css="wide", tick_count=5)
        found.append(dataclasses.replace(made, label=f"{results.measure} of each arm against {title.lower()}"))
    return found


def _curve(directory: Path, name: str) -> Series:
    points = [
        (step, value)
        for step, result in sorted(read_evaluations(directory).items())
        if (value := scalars(result).get(name)) is not None
    ]
    table = np.asarray(points, np.float64).reshape(-1, 2)
    return Series(name, table[:, 0], table[:, 1])


def _line(label: str, css: str, curves: Sequence[Series], x: Scale, y: Scale) -> Line:
    """Return the mean of the seeds at the steps that all of them have, with the seeds behind it."""
    common = sorted(set.intersection(*(set(curve.steps.tolist()) for curve in curves)))
    at = [dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True)) for curve in curves]
    mean = Series(label, np.array(common), np.array([np.mean([values[step] for values in at]) for step in common]))
    raw = "".join(path(curve, x, y) for curve in curves) if len(curves) > 1 else ""
    return Line(label, css, raw, path(mean, x, y), dots(mean, x, y), mean)


def _windows(results: Results) -> str:
    """Return what the windows of the continuation are, with their digest; nothing for other scores."""
    found = {
        str(sorted(result.items()))
        for checkpoint in results.runs.values()
        if (result := _continuation(checkpoint.path, checkpoint.step)) is not None
    }
    one = next(
        (result for each in results.runs.values() if (result := _continuation(each.path, each.step)) is not None), None
    )
    if one is None:
        return ""
    same = "the same for all runs" if len(found) == 1 else "not the same for all runs, so that there is no verdict"
    return (
        f"{one['windows']:,} windows of {one['given']} given and {one['scored']} scored tokens, digest "
        f"{one['digest']}, {same}"
    )


def _continuation(directory: Path, step: int) -> dict[str, object] | None:
    found = read_evaluations(directory).get(step, {}).get(CONTINUATION)
    return None if found is None else {name: found[name] for name in ("windows", "given", "scored", "digest")}


def _machine(results: Results) -> str:
    """Return versions, and the time of all runs in their last processes."""
    names = ("jax", "flax", "numpy")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    seconds = 0.0
    for checkpoint in results.runs.values():
        try:
            seconds += sum(read_json(checkpoint.path / run_directory.EXIT)["seconds"].values())
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return f"Python {platform.python_version()}, {versions}; runs of {formatting.duration(seconds)} in all"
