"""Host side of the guard: records rejected steps, follows the policy, and knows the newest healthy checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import assert_never

import jax

from t5x_like.checkpoints.interface import Checkpoints
from t5x_like.config import RunConfig
from t5x_like.errors import SafetyError
from t5x_like.monitoring.metrics import WeightedMean, compute
from t5x_like.trainer.divergence import DivergenceDetector
from t5x_like.utils.jsonl import RecordFile

REJECTED = "rejected_steps.jsonl"
"""File of the steps that were not applied, with the indices of their rows."""

_LOG = logging.getLogger(__name__)


class RejectedStepError(Exception):
    """The step was rejected, and its rows are to be passed over; see `TrainSession.roll_back`."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


class StepGuard:
    """Looks at each step once its metrics are on the host; all processes see the same ones.

    A checkpoint is healthy if a number of applied steps followed it: the logging interval or that of the checkpoints,
    whichever is shorter, and the loss was not rising slowly. The newest healthy one is kept on the disk.
    """

    def __init__(self, run: RunConfig, workdir: Path, checkpoints: Checkpoints, saved_steps: Sequence[int]):
        """`saved_steps` are the steps of the existing checkpoints, ascending."""
        self._config = run.training.guard
        self._interval = min(run.monitoring.log_every_steps, run.checkpoints.save_every_steps)
        self._path = workdir / REJECTED
        self._checkpoints = checkpoints
        self._saved = list(saved_steps)
        self._rejected: list[int] = []
        self._is_reported = False
        threshold = self._config.spike_threshold
        self._divergence = None if threshold is None else DivergenceDetector(self._config.spike_window, threshold)
        self.healthy_step: int | None = None

    def check(self, step: int, metrics: Mapping[str, WeightedMean], rows: range) -> None:
        """Look at the next step.

        Args:
          step: Number of the step.
          metrics: Its metrics.
          rows: Indices of its rows.

        Raises:
          SafetyError: it was rejected or the loss rises slowly, and the policy ends the run; or it cannot be recorded.
          RejectedStepError: it was rejected, and the policy is to go back.
        """
        if metrics["skipped_steps"].sum:
            self._rejected.append(step)
            self._reject(step, metrics, rows)
        elif self._divergence is not None:
            self._look_for_a_rise(self._divergence, step, compute(metrics["loss"]))
        if self._divergence is not None and self._divergence.is_rising:
            return
        for saved in self._saved:
            followed = range(saved + 1, saved + self._interval + 1)
            if followed[-1] <= step and not any(rejected in followed for rejected in self._rejected):
                self.healthy_step = self._checkpoints.protected = saved

    def saved(self, step: int) -> None:
        """Note that the state after `step` is being saved."""
        self._saved.append(step)

    def restart(self, step: int) -> None:
        """Note that training continues from the checkpoint of `step`, and that later ones are gone."""
        self._saved = [saved for saved in self._saved if saved <= step]
        self._rejected = []
        if self._divergence is not None:
            self._divergence.restart()

    def checkpoint_before(self, rejected_step: int, num_rollbacks: int) -> int:
        """Return the step of the checkpoint to go back to.

        Raises:
          SafetyError: there is no healthy checkpoint, or `num_rollbacks` is the maximum.
        """
        if self.healthy_step is None:
            reason = "there is no healthy checkpoint to go back to"
        elif num_rollbacks >= self._config.max_rollbacks:
            reason = f"there were {num_rollbacks} rollbacks already (training.guard.max_rollbacks)"
        else:
            return self.healthy_step
        raise SafetyError(f"step {rejected_step} was rejected, and {reason}. {self.advice()}")

    def advice(self) -> str:
        """Return what the user can do, and which checkpoint is healthy."""
        healthy = f"No checkpoint was followed by {self._interval} applied steps."
        if self.healthy_step is not None:
            healthy = (
                f"The newest checkpoint that was followed by {self._interval} applied steps is that of step "
                f"{self.healthy_step}."
            )
        return (
            f"{healthy} Lower training.schedule.learning_rate, or look at the rows of rejected steps ({self._path}) "
            "with `t5x-like inspect --first-row`. To continue from an earlier checkpoint, remove the later ones."
        )

    def _look_for_a_rise(self, detector: DivergenceDetector, step: int, loss: float) -> None:
        rise = detector.add(step, loss)
        if rise is None:
            return
        message = (
            f"the loss rises: its median over the {self._config.spike_window} steps up to {step} is {rise.median:.4g}, "
            f"and was {rise.lowest:.4g} up to step {rise.since}. {self.advice()}"
        )
        if self._config.policy == "abort":
            raise SafetyError(message)
        _LOG.warning("%s", message)

    def _reject(self, step: int, metrics: Mapping[str, WeightedMean], rows: range) -> None:
        is_spike = "spikes" in metrics and metrics["spikes"].sum > 0
        reason = "a spike" if is_spike else "a loss, gradient or update that is not finite"
        if jax.process_index() == 0:
            self._record(
                {
                    "step": step,
                    "reason": reason,
                    "first_row": rows[0],
                    "last_row": rows[-1],
                    "loss": compute(metrics["loss"]),
                }
            )
        message = f"step {step} had {reason} and was not applied (rows {rows[0]} to {rows[-1]})"
        match self._config.policy:
            case "abort":
                raise SafetyError(f"{message}. {self.advice()}")
            case "rollback":
                raise RejectedStepError(step)
            case "skip":
                if not self._is_reported:
                    command = f"t5x-like inspect RECIPE --first-row {rows[0]} --rows {len(rows)}"
                    _LOG.warning("%s; `%s` shows them, and %s lists all", message, command, REJECTED)
                self._is_reported = True
            case policy:
                assert_never(policy)

    def _record(self, document: Mapping[str, object]) -> None:
        try:
            records = RecordFile(self._path, restored_step=int(str(document["step"])) - 1)
            records.append(document)
            records.close()
        except OSError as error:
            raise SafetyError(f"{self._path}: cannot be written ({error.strerror or error})") from error
