"""Watchdog: ends a process that stays in one stage of the run for too long, so that the launcher can restart it.

Neither jax nor a scheduler notices a process that hangs: because of a stuck data thread, a storage that does not
answer, another process that was stopped, or a deadlock between different programs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from t5x_like.config import TimeoutsConfig
from t5x_like.distributed.startup import announce_exit, before_following
from t5x_like.errors import EXIT_RESUMABLE, UserError
from t5x_like.monitoring.time_tracker import State, TimeTracker
from t5x_like.trainer.stacks import GRACE_SECONDS, dump_stacks, end_later, report_hang, within_limit

_POLL_SECONDS = 1.0
MEASURED_VISITS = 20
"""Number of visits of a stage after which its limit follows from the longest one."""
FLOORS: Mapping[State, float] = {"step": 120.0, "data_wait": 600.0, "save": 600.0, "eval": 600.0}
"""Smallest limits, in seconds, of the stages whose limits follow from measured durations."""


def stage_limits(timeouts: TimeoutsConfig) -> dict[State, float | None]:
    """Return the configured limit of each state of the clock in seconds."""
    return {
        "init": timeouts.start,
        "restore": timeouts.restore,
        "compile": timeouts.compile,
        "step": timeouts.step,
        "data_wait": timeouts.data,
        "save": timeouts.save,
        "eval": timeouts.evaluation,
    }


class Watchdog:
    """Thread that compares the time in the current state of the clock with its limit.

    Beyond the limit it writes the stacks of all threads to the run directory and to standard error, makes the other
    processes do the same, and ends all of them with EXIT_RESUMABLE, or with EXIT_REFUSED if the run directory is gone,
    so that a restart would not help.

    A thread that holds the interpreter's lock forever would stop the watchdog as well. For that case a timer of the C
    library (`faulthandler`) prints the stacks a minute later, and another one ends the process with EXIT_RESUMABLE.
    """

    def __init__(
        self,
        timeouts: TimeoutsConfig,
        clock: TimeTracker,
        stacks: Path,
        on_timeout: Callable[[int, str], None],
        require: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the watchdog.

        Args:
          timeouts: Limits of the stages.
          clock: Clock of the run, whose state is the stage.
          stacks: File for the stacks of this process.
          on_timeout: Called with the exit code and the reason before the process ends.
          require: Called before that; raises UserError if a restart would not help, because the run directory is gone:
            the processes may wait for each other in a save that one of them cannot write.
        """
        self._limits, self._factor = stage_limits(timeouts), timeouts.measured_factor
        self._clock, self._stacks, self._on_timeout, self._require = clock, stacks, on_timeout, require
        self._stop = threading.Event()
        self._dump_only = before_following(lambda: dump_stacks("another process of the run ended", stacks))
        self._thread = threading.Thread(target=self._work, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._dump_only()
        self._stop.set()
        self._thread.join(2 * _POLL_SECONDS)

    def limit(self, state: State) -> float | None:
        """Return the limit of a state in seconds; None without one."""
        configured = self._limits[state]
        longest, visits = self._clock.longest_visit(state)
        if configured is None or state not in FLOORS or visits < MEASURED_VISITS:
            return configured
        return min(configured, max(FLOORS[state], self._factor * longest))

    def _work(self) -> None:
        try:
            while not self._stop.wait(_POLL_SECONDS):
                state, seconds = self._clock.current()
                limit = self.limit(state)
                end_later(None if limit is None else limit + GRACE_SECONDS)
                if limit is not None and seconds > limit:
                    self._end(state, limit)
        finally:
            end_later(None)

    def _end(self, state: State, limit: float) -> None:
        message = (
            f"the stage {state!r} takes longer than {limit:g} seconds, its limit (`timeouts`); the stacks of all "
            f"threads are in {self._stacks}"
        )
        code = EXIT_RESUMABLE
        if (refusal := self._refusal()) is not None:
            code, message = refusal.exit_code, f"{message}. {refusal}"
        report_hang(message, self._stacks, lambda reason: self._on_timeout(code, reason))
        announce_exit(code)
        os._exit(code)

    def _refusal(self) -> UserError | None:
        refusals: list[UserError] = []

        def check() -> None:
            try:
                self._require()
            except UserError as error:
                refusals.append(error)

        within_limit(check)
        return refusals[0] if refusals else None
