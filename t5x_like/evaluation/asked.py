"""What `t5x-like eval` is asked for: which checkpoints, and what of them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from t5x_like.config.seqio import EvaluationTask

_WITH_STEP = re.compile(r"(.+):(\d+(?:,\d+)*)")


@dataclasses.dataclass(frozen=True)
class Reference:
    """A place, and the steps of it that were named; none: the newest."""

    path: Path
    steps: tuple[int, ...] = ()


def parse(text: str) -> Reference:
    """`DIR`, or `DIR:STEP` or `DIR:STEP,STEP`; a directory whose name has such an end is taken as it is."""
    match = _WITH_STEP.fullmatch(text)
    if match is None or Path(text).exists():
        return Reference(Path(text))
    return Reference(Path(match[1]), tuple(int(step) for step in match[2].split(",")))


@dataclasses.dataclass(frozen=True)
class Asked:
    """The options of the command; see `commands.evaluate`.

    Attributes:
      steps: Of every reference that names none itself.
      tasks: Beside those of a run's own configuration; `own_tasks` leaves these out.
      only_new: Steps that evaluations.jsonl has not yet.
      all_steps: All that are there.
    """

    steps: tuple[int, ...] = ()
    num_batches: int | None = None
    tasks: tuple[EvaluationTask, ...] = ()
    own_tasks: bool = True
    held_out: bool = True
    intervals: bool = True
    only_new: bool = False
    all_steps: bool = False
