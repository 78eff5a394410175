"""Decisions that follow from the recorded scores of a run: which checkpoints are the best, and when to stop early.

Both are functions of evaluations.jsonl up to a step, so that a run that was killed decides as an undisturbed one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from t5x_like.config import EarlyStopping, KeepBest, RunConfig
from t5x_like.config.run import Direction
from t5x_like.errors import ConfigError, ConfigProblem, DataError
from t5x_like.evaluation.results_store import Result, numbers, read_evaluations

_LOG = logging.getLogger(__name__)


def best_steps(scores: Mapping[int, float], keep: KeepBest) -> list[int]:
    """Return the steps with the best scores; of equal scores, the earlier step is the better one."""
    ranked = sorted(scores, key=lambda step: (_loss(scores[step], keep.direction), step))
    return ranked[: keep.count]


def kept_steps(run_dir: Path, keep: KeepBest | None, steps: Sequence[int]) -> Collection[int]:
    """Return which of the saved steps are kept because of their scores; all, if the scores cannot be read."""
    if keep is None:
        return ()
    try:
        results = read_evaluations(run_dir)
    except DataError as error:
        _LOG.warning("%s: no checkpoint is removed", error)
        return steps
    scored = {step: score for step in steps if (score := _score(results.get(step), keep.metric)) is not None}
    return best_steps(scored, keep)


def reason_to_stop(scores: Mapping[int, float | None], stopping: EarlyStopping) -> str | None:
    """Return why a run with these scores ends after the last of them; None if it goes on.

    Args:
      scores: Score of each evaluation by step; None if it was not finite, which is no improvement.
      stopping: The rule.
    """
    best, best_step, waited = math.inf, None, 0
    for step in sorted(scores):
        score = scores[step]
        loss = math.inf if score is None else _loss(score, stopping.direction)
        if loss < best - stopping.min_delta if best_step is not None else loss < math.inf:
            best, best_step, waited = loss, step, 0
        else:
            waited += 1
    if waited < stopping.patience:
        return None
    since = "has not been finite" if best_step is None else f"has not improved since step {best_step}"
    return f"stopped early: {stopping.metric} {since}, in {waited} evaluations (evaluation.early_stopping)"


def early_stop(run_dir: Path, run: RunConfig, step: int) -> str | None:
    """Return why a run ends after its evaluation at `step`; None if it goes on."""
    stopping, every = run.evaluation.early_stopping, run.evaluation.every_steps
    if stopping is None or every is None or step % every:
        return None
    # Other commands may have evaluated other steps.
    results = {at: result for at, result in read_evaluations(run_dir).items() if at <= step and at % every == 0}
    return reason_to_stop({at: _score(result, stopping.metric) for at, result in results.items()}, stopping)


def require_metrics(run: RunConfig, result: Result) -> None:
    """Raise ConfigError if a result lacks a metric that the configuration names; its value need not be finite."""
    known = numbers(result)
    metrics = {
        "checkpoints.keep_best.metric": run.checkpoints.keep_best,
        "evaluation.early_stopping.metric": run.evaluation.early_stopping,
    }
    expected = ", ".join(known)
    problems = [
        ConfigProblem(where, repr(rule.metric), f"a score of this run's evaluations: {expected}")
        for where, rule in metrics.items()
        if rule is not None and rule.metric not in known
    ]
    if problems:
        raise ConfigError(problems)


def _score(result: Result | None, metric: str) -> float | None:
    value = None if result is None else numbers(result).get(metric)
    return value if value is not None and math.isfinite(value) else None


def _loss(score: float, direction: Direction) -> float:
    return score if direction == "min" else -score
