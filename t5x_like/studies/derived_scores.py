"""Scores that are computed from the results of runs: the steps to another score, and summaries of several runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.evaluation.bootstrap import DRAWS
from t5x_like.evaluation.comparison import EvaluatedCheckpoint, lower_is_better
from t5x_like.evaluation.results_store import read_evaluations, scalars
from t5x_like.studies.study import StepsTo, Summary

RunKey = tuple[str, int | None]
"""Arm and seed of a run."""


def with_steps(
    runs: Mapping[RunKey, EvaluatedCheckpoint], wanted: Sequence[StepsTo]
) -> tuple[dict[RunKey, EvaluatedCheckpoint], dict[str, frozenset[str]]]:
    """Return the runs with the scores of `StepsTo`, and the arms with a run that does not reach them by name.

    A run without the other score, or of a seed that the arm of the target does not have, has no such score.
    """
    found, unreached = dict(runs), {}
    for one in wanted:
        arms = set()
        for (arm, seed), run in runs.items():
            target = one.target
            if isinstance(target, str):
                of_target = runs.get((target, seed))
                if of_target is None or one.score not in of_target.values:
                    continue
                target = of_target.values[one.score]
            if one.score not in run.values:
                continue
            steps = _first_step(run, one.score, target)
            if steps is None:
                arms.add(arm)
            score = {one.name: float(run.step if steps is None else steps)}
            found[arm, seed] = _with_scores(found[arm, seed], score)
        unreached[one.name] = frozenset(arms)
    return found, unreached


def _first_step(run: EvaluatedCheckpoint, score: str, target: float) -> int | None:
    sign = -1 if lower_is_better(score) else 1
    for step, result in sorted(read_evaluations(run.path).items()):
        value = scalars(result).get(score)
        if value is not None and sign * value >= sign * target:
            return step
    return None


def summaries_of(
    runs: Mapping[RunKey, EvaluatedCheckpoint], summaries: Sequence[Summary]
) -> dict[RunKey, EvaluatedCheckpoint]:
    """Return the scores of each summary by its name and seed, for the seeds of which all its arms have results.

    Raises:
      ConfigError: a summary cannot be computed from the scores of its runs.
    """
    found = {}
    for summary in summaries:
        for seed in dict.fromkeys(seed for _, seed in runs):
            if all((arm, seed) in runs for arm in summary.arms):
                of_seed = {arm: runs[arm, seed] for arm in summary.arms}
                empty = dataclasses.replace(of_seed[summary.arms[0]], values={}, draws={}, examples={})
                found[summary.name, seed] = _with_scores(empty, _computed(summary, of_seed))
    return found


def _computed(summary: Summary, runs: Mapping[str, EvaluatedCheckpoint]) -> Mapping[str, float]:
    try:
        return summary.compute(runs)
    except (KeyError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        found = f"runs that it cannot be computed from ({reason})"
        expected = f"the scores that it reads in runs of {', '.join(runs)}"
        raise ConfigError([ConfigProblem(f"summary {summary.name}", found, expected)]) from None


def _with_scores(run: EvaluatedCheckpoint, scores: Mapping[str, float]) -> EvaluatedCheckpoint:
    # The numbers do not vary with the windows: their draws are constant, and intervals cover the seeds.
    return dataclasses.replace(
        run,
        values={**run.values, **scores},
        draws={**run.draws, **{name: np.full(DRAWS, value) for name, value in scores.items()}},
        examples={**run.examples, **{name: name for name in scores}},
    )
