"""Options of an evaluation."""

from __future__ import annotations

import dataclasses

from t5x_like.config.seqio_task import EvaluationTask


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """Options of the command `eval`.

    Attributes:
      num_batches: Number of held-out batches per objective; None: that of the run's configuration.
      tasks: Tasks in addition to those of a run's configuration.
      own_tasks: Evaluate the Tasks of a run's configuration.
      held_out: Score held-out text.
      split: Split of the held-out text. Only the scores of "validation" are recorded in a run.
      intervals: Compute bootstrap intervals.
      only_new: Evaluate only steps that evaluations.jsonl does not contain.
      all_steps: Evaluate all steps.
      continuation: Numbers of given and scored tokens of windows that models of every architecture share; None: those
        of each run's configuration.
    """

    num_batches: int | None = None
    tasks: tuple[EvaluationTask, ...] = ()
    own_tasks: bool = True
    held_out: bool = True
    split: str = "validation"
    intervals: bool = True
    only_new: bool = False
    all_steps: bool = False
    continuation: tuple[int, int] | None = None
