"""Results of a study: differences of arms with intervals over seeds and windows, and verdicts on predictions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.evaluation.bootstrap import interval
from t5x_like.evaluation.comparison import EvaluatedCheckpoint, lower_is_better
from t5x_like.evaluation.results_store import BITS_BOUND
from t5x_like.studies.derived_scores import summaries_of, with_steps
from t5x_like.studies.study import Prediction, Study, StudyRun
from t5x_like.utils.type_aliases import FloatArray

FEWEST_SEEDS = 3
"""Fewest seeds of a verdict: two runs do not show how much runs of one arm differ."""
_SEED_DRAWS = 0x5EED
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""The 97.5 % points of Student's t with 1 to 15 degrees of freedom."""
_NORMAL = 1.960

Verdict = Literal["held", "failed", "undecided"]
Side = Literal["", "at most", "at least"]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Score of an arm, or difference of two arms.

    Attributes:
      value: Mean over the seeds; of a ratio, the geometric mean.
      interval: 95 % bootstrap interval over seeds and windows; with one seed over windows only. None: the runs were not
        scored on the same windows, or their rows are missing.
      by_seed: Value of each seed.
      side: The exact value is at most ("at most") or at least ("at least") this one, because one of the scores is an
        upper bound, or the steps of a run that does not reach its target; "" otherwise.
    """

    value: float
    interval: tuple[float, float] | None
    by_seed: tuple[float, ...]
    side: Side = ""


@dataclasses.dataclass(frozen=True)
class Results:
    """Evaluated runs of a study.

    Attributes:
      runs: The result of each run, by arm and seed.
      measure: Name of the score of the study.
      unreached: For each score of `Study.steps_to`, the arms with a run that does not reach its target.
      summaries: Scores of `Study.summaries` by name and seed.
    """

    runs: Mapping[tuple[str, int | None], EvaluatedCheckpoint]
    measure: str
    unreached: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)
    summaries: Mapping[tuple[str, int | None], EvaluatedCheckpoint] = dataclasses.field(default_factory=dict)

    @property
    def arms(self) -> list[str]:
        """Names of the arms that have results."""
        return list(dict.fromkeys(arm for arm, _ in self.runs))

    def seeds(self, *arms: str) -> list[int | None]:
        """Return the seeds that all the arms, or summaries, have a result of."""
        seeds = dict.fromkeys(seed for _, seed in self.runs)
        return [seed for seed in seeds if all(self._of(arm, seed) is not None for arm in arms)]

    def _of(self, arm: str, seed: int | None) -> EvaluatedCheckpoint | None:
        return self.runs.get((arm, seed)) or self.summaries.get((arm, seed))

    def score(self, arm: str, name: str | None = None) -> Estimate | None:
        """Return the score of an arm or a summary; None if a run of it does not have the score."""
        return self.compared(arm, None, name)

    def predicted(self, prediction: Prediction) -> Estimate | None:
        """Return what a prediction is about; None if there is no result."""
        return self.compared(prediction.arm, prediction.than, prediction.score, is_ratio=prediction.is_ratio)

    def compared(
        self, arm: str, than: str | None, name: str | None = None, *, is_ratio: bool = False
    ) -> Estimate | None:
        """Return the score of an arm minus that of another one, or divided by it.

        None: they have no seed in common, lack the score, or both have a run that does not reach the target of the
        score; or the scores of a ratio are not positive.

        Seeds and windows are paired. `bootstrap.draws` draws the windows, the same for all runs. Seeds
        are drawn with replacement, and the deviations of their means are scaled so that the interval is as wide as
        Student's t has it: three seeds drawn from three vary too little for a 95 % interval. Of a ratio, the logarithms
        are averaged and drawn, so that its interval is positive, and the inverse of that of the inverse ratio.
        """
        name = name or self.measure
        pairs = []
        for seed in self.seeds(*[arm] if than is None else [arm, than]):
            first, second = self._of(arm, seed), None if than is None else self._of(than, seed)
            assert first is not None
            pairs.append((first, second))
        everyone = [one for pair in pairs for one in pair if one is not None]
        if not everyone or any(name not in one.values for one in everyone):
            return None
        sides = [self._side(name, each, one) for each, one in zip((arm, than), pairs[0], strict=True)]
        if sides == ["at least", "at least"]:
            return None
        if is_ratio and any(one.values[name] <= 0 for one in everyone):
            return None

        def scale(score: float | FloatArray) -> FloatArray:
            return np.asarray(np.log(score) if is_ratio else score)

        def unscale(score: float | FloatArray) -> FloatArray:
            return np.asarray(np.exp(score) if is_ratio else score)

        values = np.array(
            [scale(first.values[name]) - (scale(second.values[name]) if second else 0.0) for first, second in pairs]
        )
        around = None
        if all(name in one.draws and one.examples.get(name) == everyone[0].examples.get(name) for one in everyone):
            drawn = np.array(
                [scale(first.draws[name]) - (scale(second.draws[name]) if second else 0.0) for first, second in pairs]
            )
            around = interval(_both(values, drawn))
        ends = None if around is None else (float(unscale(around[0])), float(unscale(around[1])))
        return Estimate(float(unscale(values.mean())), ends, tuple(unscale(values).tolist()), _joined(sides))

    def _side(self, name: str, arm: str | None, run: EvaluatedCheckpoint | None) -> Side:
        """Return on which side of the score of an arm its exact value can be."""
        if arm is None or run is None:
            return ""
        if arm in self.unreached.get(name, ()):
            return "at least"
        return "at most" if name in run.bounds or name == BITS_BOUND else ""


def _both(values_S: FloatArray, windows_SxD: FloatArray) -> FloatArray:
    """Return draws over seeds and windows: [draws]."""
    count, num_draws = windows_SxD.shape
    # What the windows add, around the same mean over the seeds.
    by_windows = windows_SxD.mean(axis=0)
    if count == 1:
        return by_windows
    student = _STUDENT[count - 2] if count - 2 < len(_STUDENT) else _NORMAL
    scale = student / _NORMAL * math.sqrt(count / (count - 1))
    chosen_DxS = np.random.default_rng([_SEED_DRAWS, count]).integers(count, size=(num_draws, count))
    by_seeds = values_S[chosen_DxS].mean(axis=1) - values_S.mean()
    return by_windows + scale * by_seeds


def _joined(sides: Sequence[Side]) -> Side:
    """Return on which side of a difference, or of a ratio, its exact value can be."""
    match sides:
        case [side, ""]:
            return side
        case ["", "at most"]:
            return "at least"
        case ["", "at least"]:
            return "at most"
        case _:
            return ""


def verdict(prediction: Prediction, estimate: Estimate | None) -> Verdict | None:
    """Return whether a prediction held: its whole interval is in the range (held) or outside (failed), or neither.

    None: no verdict, for lack of results, of windows in common, or of `FEWEST_SEEDS`.
    """
    if estimate is None or estimate.interval is None or len(estimate.by_seed) < FEWEST_SEEDS:
        return None
    low, high = estimate.interval
    # Beyond a bound the exact value can be anywhere.
    low = -math.inf if estimate.side == "at most" else low
    high = math.inf if estimate.side == "at least" else high
    if prediction.low <= low and high <= prediction.high:
        return "held"
    if high < prediction.low or low > prediction.high:
        return "failed"
    return "undecided"


def collect(study: Study, runs: Sequence[tuple[StudyRun, EvaluatedCheckpoint]]) -> Results:
    """Return the results of the runs, and choose the score if the study does not name it.

    Raises:
      ConfigError: the runs do not all have the score.
    """
    found, unreached = with_steps({(run.arm, run.seed): checkpoint for run, checkpoint in runs}, study.steps_to)
    everyone = list(found.values())
    shared = [name for name in everyone[0].values if all(name in one.values for one in everyone)]
    usual = [name for name in ("bits_per_byte", BITS_BOUND) if name in shared]
    losses = [name for name in shared if name.startswith("loss/")]
    chosen = study.measure or next(iter(usual or (losses if len(losses) == 1 else [])), None)
    if chosen is None or chosen not in shared:
        missing = "no score that is the usual one" if chosen is None else f"{chosen}, which not all runs have"
        raise ConfigError([ConfigProblem("measure", missing, f"one of {', '.join(shared) or 'none'}")])
    return Results(found, chosen, unreached, summaries_of(found, study.summaries))


def ordered_arms(results: Results) -> list[str]:
    """Return the arms by their score, the best first; of all their seeds."""
    sign = 1 if lower_is_better(results.measure) else -1
    means = {arm: score.value for arm in results.arms if (score := results.score(arm)) is not None}
    return sorted(means, key=lambda arm: sign * means[arm])


def differs(estimate: Estimate | None) -> bool:
    """Return whether the interval of a difference leaves out 0, on the side that a bound does not leave open."""
    if estimate is None or estimate.interval is None:
        return False
    low, high = estimate.interval
    return (low > 0 and estimate.side != "at most") or (high < 0 and estimate.side != "at least")
