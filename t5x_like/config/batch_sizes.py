"""Number of rows of each step of a run, which grows over the stages of a ramp."""

from __future__ import annotations

import dataclasses
from typing import Any

from t5x_like.config.training import TrainingConfig


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """Rows of each step. The rows of a run are numbered, and each step takes the next ones.

    Attributes:
      final: Rows of a step after all stages.
      stages: (first step after the stage, rows of each of its steps), in their order.
    """

    final: int
    stages: tuple[tuple[int, int], ...] = ()

    def at(self, step: int) -> int:
        """Return the number of rows of a step."""
        return next((rows for end, rows in self.stages if step < end), self.final)

    def rows_before(self, step: int) -> int:
        """Return the number of rows of all steps before this one."""
        total = begin = 0
        for end, rows in self.stages:
            total += rows * (min(end, step) - begin)
            if step <= end:
                return total
            begin = end
        return total + self.final * (step - begin)

    def steps_alike(self, step: int) -> int | None:
        """Return the number of steps, from this one on, that have as many rows as it; None: all further ones."""
        return next((end - step for end, _ in self.stages if step < end), None)

    def step_of(self, row: Any) -> Any:
        """Return the step that reads a row; `row` is its number, or an array of numbers."""
        begin = step = 0
        for end, rows in (*self.stages, (None, self.final)):
            first = self.rows_before(begin)
            # Steps of this stage that end before the row: none for rows of earlier stages.
            steps = (row >= first) * ((row - first) // rows)
            step = step + (steps if end is None else steps - (steps > end - begin) * (steps - (end - begin)))
            begin = end or begin
        return step

    def in_full_batches(self, steps: int) -> float:
        """Return the number of steps of full size that have as many rows as the first `steps` steps."""
        return self.rows_before(steps) / self.final


def batch_sizes(training: TrainingConfig) -> BatchSizes:
    """Return the number of rows of each step of a run."""
    stages = tuple((stage.until_step, stage.batch_size) for stage in training.batch_size_ramp)
    return BatchSizes(training.global_batch_size, stages)
