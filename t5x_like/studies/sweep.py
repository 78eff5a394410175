"""Sweeps: studies whose arms are the combinations of values of a recipe's fields, in the order of their scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rich import box
from rich.table import Table

from t5x_like.studies.results import Results, differs, ordered_arms
from t5x_like.studies.study import Arm, Study
from t5x_like.utils import formatting
from t5x_like.utils.console import Console
from t5x_like.utils.sanitize import say

WINDOWS_ONLY = "the intervals cover the choice of the held-out text only; --seeds 0 1 2 shows how much seeds differ"


def sweep_study(arms: Sequence[Arm], seeds: Sequence[int], metric: str | None) -> Study:
    """Return the study of a sweep, which has no budget and no predictions."""
    return Study(
        question="Which of these values has the best score?",
        arms=tuple(arms),
        seeds=tuple(seeds),
        measure=metric,
        cannot_show=(
            "Whether the order is the same for other budgets, sizes of the model, or text.",
            "The best of many values is better by chance: its score is an optimistic one.",
        ),
    )


def best_first(study: Study, results: Results) -> Study:
    """Return the study with the arms that have results, the best first, so that differences are taken from the best."""
    order = ordered_arms(results)
    missing = [arm for arm in study.arms if arm.name not in order]
    return dataclasses.replace(study, arms=(*(study.arm(name) for name in order), *missing))


def sweep_report(results: Results, console: Console) -> None:
    """Print the arms, the best first, with intervals, and those that are not significantly worse than the best."""
    order = ordered_arms(results)
    title = f"{results.measure} of {len(order):,} arms, the best first"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("arm", overflow="fold")
    for name in ("value", "95 %", "minus\nbest", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    close = []
    for name in order:
        score, difference = results.score(name), results.compared(name, order[0])
        assert score is not None
        row = [name, formatting.number(score.value), around(score.interval)]
        if name == order[0] or difference is None:
            table.add_row(*row, "", "", "")
            continue
        verdict = "worse" if differs(difference) else ""
        if not verdict and difference.interval is not None:
            close.append(name)
        note = "other text" if difference.interval is None and score.interval is not None else verdict
        table.add_row(*row, f"{difference.value:+.4f}", around(difference.interval), note)
    console.print(table)
    best = results.score(order[0])
    assert best is not None
    shown = f", 95 % {around(best.interval)}" if best.interval else ""
    say(f"best: {order[0]}, {results.measure} {formatting.number(best.value)}{shown}")
    if close:
        say(f"not significantly worse: {', '.join(close)}")
    if len(results.seeds(order[0])) < 2:
        say(WINDOWS_ONLY)


def around(interval: tuple[float, float] | None) -> str:
    """Return an interval as text; nothing if there is none."""
    return "" if interval is None else f"[{formatting.number(interval[0])}, {formatting.number(interval[1])}]"
