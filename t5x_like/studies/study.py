"""A study: arms that differ in what the question asks about, one budget, one score, and predictions made before it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from t5x_like.config import RunConfig
from t5x_like.config.validation import validate
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.evaluation.comparison import EvaluatedCheckpoint
from t5x_like.evaluation.results_store import BITS_OF_CONTINUATION

Tier = Literal["cpu", "gpu"]
"""Size of a study: for two cores within its budget, or for one accelerator."""
BudgetUnit = Literal["executed_flops", "model_flops", "loss_tokens", "raw_tokens", "steps"]

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the things that are compared.

    Attributes:
      name: Its name, which the directories of its runs begin with.
      run: Configuration, whose seeds, and with a budget the number of steps, are set for each run.
      recipe: RECIPE with overrides, from which `train` makes the same configuration: for a sweep, whose recipe may
        register plug-ins. Empty: the configuration itself is handed to `train`.
      parent: Name of the arm from whose run of the same seed this one starts. `initialize_from.directory` of `run` is
        the directory of the study; it becomes that of the run.
      budget: Amount of each run, in place of that of the study: for an arm from which others start.
    """

    name: str
    run: RunConfig
    recipe: tuple[str, ...] = ()
    parent: str | None = None
    budget: Budget | None = None


@dataclasses.dataclass(frozen=True)
class Budget:
    """Amount that each run of every arm may use.

    Attributes:
      unit: executed_flops: FLOPs of matrix products that the devices execute at most: with recomputation and hidden
        pairs of attention, which attention by blocks skips in part.
        model_flops: those that the model needs. loss_tokens: scored targets. raw_tokens: tokens of text. steps: steps.
      amount: Amount of one run.
    """

    unit: BudgetUnit
    amount: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Statement about a result that was made before it.

    Attributes:
      claim: The statement in words.
      source: Where it comes from: a publication, a calculation, or a guess.
      arm: The arm that it is about.
      than: The score of this arm is subtracted from that of `arm`; None: the claim is about the score itself.
      low, high: The claim holds if the difference, or the score, is in this range; at least one of them is finite.
      score: Name of the score; None: that of the study.
      is_ratio: The score of `arm` is divided by that of `than`, in place of a difference.
    """

    claim: str
    source: str
    arm: str
    than: str | None = None
    low: float = -math.inf
    high: float = math.inf
    score: str | None = None
    is_ratio: bool = False


@dataclasses.dataclass(frozen=True)
class StepsTo:
    """Score of a run: the first evaluated step at which another score of it is as good as a target.

    A run that does not reach the target has its last step as a lower bound.

    Attributes:
      name: Name of this score, different from those of the arms and the summaries.
      score: Name of the other score, which training evaluates.
      target: Its value, or the name of the arm whose last value is the target for runs of the same seed.
    """

    name: str
    score: str
    target: float | str


@dataclasses.dataclass(frozen=True)
class Summary:
    """Scores that are computed from several runs of a seed, such as the exponents of a fit.

    Predictions name a summary as they name an arm. Its intervals cover the seeds.

    Attributes:
      name: Its name, different from those of the arms.
      arms: Names of the arms; a seed without a result of one of them has no summary.
      compute: Returns the scores by name from the runs by arm.
    """

    name: str
    arms: tuple[str, ...]
    compute: Callable[[Mapping[str, EvaluatedCheckpoint]], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Study:
    """A question that several runs answer.

    Attributes:
      question: The question, in one sentence.
      arms: What is compared; differences are taken from the first arm.
      seeds: Seeds of `data.seed` and `training.seed`, with a run of each arm for each of them. Empty: those of the
        configurations, one run of each arm.
      budget: Amount of each run; None: `training.num_train_steps` of each arm.
      measure: Name of the score by which the arms are compared, as in TensorBoard; None: the usual one of the runs.
      predictions: What was expected.
      cannot_show: What such runs cannot tell, one sentence each.
      also: Names of further scores that the page has.
      steps_to: Further scores, computed from the curves of the runs, which the page has as well.
      summaries: Scores of several runs together, which the page has as well.
      description: A few sentences on the task and the arms.
      write_files: Writes the files that the arms read into a folder; it is called with that of the study before the
        stores are prepared.
    """

    question: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = ()
    budget: Budget | None = None
    measure: str | None = BITS_OF_CONTINUATION
    predictions: tuple[Prediction, ...] = ()
    cannot_show: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    steps_to: tuple[StepsTo, ...] = ()
    summaries: tuple[Summary, ...] = ()
    description: str = ""
    write_files: Callable[[Path], None] | None = None

    def arm(self, name: str) -> Arm:
        """Return the arm of this name, which the study has."""
        return next(arm for arm in self.arms if arm.name == name)


@dataclasses.dataclass(frozen=True)
class StudyRun:
    """A run of a study: an ordinary run directory.

    Attributes:
      arm: Name of its arm.
      seed: Its seed; None: those of the arm's configuration.
      run: Its configuration, whose name is that of its directory.
      recipe: RECIPE with overrides for `train`; empty: the configuration itself.
      parent: Name of the run that it starts from, which is trained first; None: of none.
    """

    arm: str
    seed: int | None
    run: RunConfig
    recipe: tuple[str, ...] = ()
    parent: str | None = None

    @property
    def name(self) -> str:
        """Name of the run and of its directory."""
        return self.run.name


def require_valid(study: Study) -> None:
    """Raise ConfigError with all problems of a study, those of its arms included."""
    if problems := [*_problems(study)]:
        raise ConfigError(problems)


def _problems(study: Study) -> Iterator[ConfigProblem]:
    names = [arm.name for arm in study.arms]
    if not names:
        yield ConfigProblem("study.arms", "no arm", "at least one")
    for name in names:
        if not _NAME.fullmatch(name):
            yield ConfigProblem("study.arms", repr(name), "letters, digits, '-', '_' and '.', for a directory's name")
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield ConfigProblem("study.arms", f"{name!r} more than once", "arms of different names")
    if len(set(study.seeds)) < len(study.seeds) or any(not 0 <= seed < 2**31 for seed in study.seeds):
        yield ConfigProblem("study.seeds", repr(study.seeds), "different numbers from 0 to 2^31 - 1")
    yield from _budget_problems("study.budget", study.budget)
    for number, prediction in enumerate(study.predictions):
        where = f"study.predictions.{number}"
        for field, named in (("arm", prediction.arm), ("than", prediction.than)):
            if named is not None and named not in (known := [*names, *(one.name for one in study.summaries)]):
                yield ConfigProblem(f"{where}.{field}", repr(named), f"one of {', '.join(known)}")
        if not prediction.low <= prediction.high or math.isinf(prediction.low) and math.isinf(prediction.high):
            yield ConfigProblem(where, f"low {prediction.low}, high {prediction.high}", "a range with a finite end")
        if prediction.is_ratio and prediction.than is None:
            yield ConfigProblem(f"{where}.than", "None", "the arm whose score is the divisor of the ratio")
        if not prediction.source.strip():
            yield ConfigProblem(f"{where}.source", "nothing", "where the prediction comes from")
    for number, one in enumerate(study.steps_to):
        if isinstance(one.target, str) and one.target not in names:
            yield ConfigProblem(f"study.steps_to.{number}.target", repr(one.target), f"one of {', '.join(names)}")
    for number, summary in enumerate(study.summaries):
        unknown = [name for name in summary.arms if name not in names]
        if unknown or not summary.arms:
            expected = f"names of arms: {', '.join(names)}"
            yield ConfigProblem(f"study.summaries.{number}.arms", ", ".join(unknown) or "no arm", expected)
    derived = [
        *((f"study.summaries.{number}.name", one.name) for number, one in enumerate(study.summaries)),
        *((f"study.steps_to.{number}.name", one.name) for number, one in enumerate(study.steps_to)),
    ]
    taken = set(names)
    for where, name in derived:
        if name in taken:
            yield ConfigProblem(where, repr(name), "another name than those of arms, and of other summaries and steps")
        taken.add(name)
    if study.measure == BITS_OF_CONTINUATION:
        yield from _continuation_problems(study.arms)
    for arm in study.arms:
        yield from _budget_problems(f"arm {arm.name}: budget", arm.budget)
        yield from _parent_problems(arm, study.arms)
        for problem in validate(arm.run):
            yield dataclasses.replace(problem, where=f"arm {arm.name}: {problem.where}")
        if arm.run.plugins and not arm.recipe:
            expected = "none: an arm of a study is handed to `train` as a configuration without code"
            yield ConfigProblem(f"arm {arm.name}: plugins", ", ".join(arm.run.plugins), expected)


def _budget_problems(where: str, budget: Budget | None) -> Iterator[ConfigProblem]:
    if budget is None:
        return
    if budget.unit not in get_args(BudgetUnit):
        yield ConfigProblem(f"{where}.unit", repr(budget.unit), f"one of {', '.join(get_args(BudgetUnit))}")
    if not 0 < budget.amount < math.inf:
        yield ConfigProblem(f"{where}.amount", repr(budget.amount), "a number above 0")


def _parent_problems(arm: Arm, arms: Sequence[Arm]) -> Iterator[ConfigProblem]:
    if arm.parent is None:
        return
    where = f"arm {arm.name}: parent"
    if arm.parent not in [other.name for other in arms if other.parent is None]:
        yield ConfigProblem(where, repr(arm.parent), "the name of an arm without a parent")
    if arm.recipe:
        yield ConfigProblem(where, repr(arm.parent), "None for an arm with a recipe")
    if arm.run.initialize_from is None:
        expected = "an InitializeFrom whose directory is that of the study"
        yield ConfigProblem(f"arm {arm.name}: initialize_from", "None", expected)


def _continuation_problems(arms: Sequence[Arm]) -> Iterator[ConfigProblem]:
    """Yield a problem for each arm that is not scored on the windows of the first one."""
    for arm in arms:
        found, first = (each.run.evaluation for each in (arm, arms[0]))
        where = f"arm {arm.name}: evaluation.continuation"
        if found.continuation is None:
            yield ConfigProblem(where, "None", "numbers of given and scored tokens, which are the measure of the study")
        elif (found.continuation, found.continuation_windows) != (first.continuation, first.continuation_windows):
            yield ConfigProblem(where, f"{found.continuation}", f"{first.continuation} as in arm {arms[0].name}")
