"""Profiles: traces of some training steps by jax's profiler, which TensorBoard's profile plugin and xprof open.

The steps are given in advance (`monitoring.profile_steps`), or a profile of the next steps is requested while the run
is in progress: SIGUSR1 asks one process, and the file `profile` in the run directory asks all of them, each time it is
written.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import jax

from t5x_like.monitoring.writers import TENSORBOARD

REQUEST = "profile"
"""File of the run directory whose modification requests a profile."""
REQUESTED_STEPS = 5
_POLL_SECONDS = 5.0
_LOG = logging.getLogger(__name__)


class StepProfiler:
    """Profiler of the steps of one process."""

    def __init__(self, run_dir: Path, steps: tuple[int, int] | None, process: int = 0) -> None:
        """
        Args:
          run_dir: The run directory.
          steps: First step of the profile and the one after the last, as numbers of steps taken before; None: only
            profiles that are requested.
          process: Index of this process.
        """
        folder = run_dir / TENSORBOARD
        # Processes on one host would write files of the same name.
        self.directory = folder / f"process.{process}" if process else folder
        self._request_file = run_dir / REQUEST
        self._seen = self._modified()
        self._polled = time.monotonic()
        self._steps = steps
        self._is_requested = False
        self._active: tuple[int, int] | None = None

    def request(self, number: int = 0, frame: FrameType | None = None) -> None:
        """Request a profile of the next steps; this is a signal handler."""
        self._is_requested = True

    @contextlib.contextmanager
    def step(self, step: int, wait: Callable[[], object]) -> Iterator[None]:
        """Mark the dispatch of a step, and begin or end a profile that it is due for.

        Args:
          step: Number of steps taken before.
          wait: Returns when all dispatched steps are done.
        """
        if self._active is None:
            self._begin_if_due(step, wait)
        if self._active is None:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if step + 1 >= self._active[1]:
            wait()
            self.close()

    def close(self) -> None:
        """End the profile, if there is one, and write its files."""
        if self._active is not None:
            start, self._active = self._active[0], None
            jax.profiler.stop_trace()
            _LOG.info("the profile from step %d on is in %s", start, self.directory)

    def _begin_if_due(self, step: int, wait: Callable[[], object]) -> None:
        if self._steps is not None and self._steps[0] <= step < self._steps[1]:
            stop = self._steps[1]
        elif self._is_asked():
            stop = step + REQUESTED_STEPS
        else:
            return
        self._is_requested = False
        # The steps before are not part of the profile.
        wait()
        try:
            jax.profiler.start_trace(self.directory)
        except Exception as error:
            self._steps = None
            _LOG.warning("step %d is not profiled: %s", step, error)
            return
        self._active = (step, stop)

    def _is_asked(self) -> bool:
        if time.monotonic() - self._polled > _POLL_SECONDS:
            self._polled = time.monotonic()
            modified = self._modified()
            if modified is not None and modified != self._seen:
                self._is_requested = True
            self._seen = modified
        return self._is_requested

    def _modified(self) -> int | None:
        try:
            return self._request_file.stat().st_mtime_ns
        except OSError:
            return None


@contextlib.contextmanager
def step_profiler(run_dir: Path, steps: tuple[int, int] | None) -> Iterator[StepProfiler]:
    """Open the profiler of this process; SIGUSR1 requests a profile within the context."""
    profiler = StepProfiler(run_dir, steps, jax.process_index())
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGUSR1, profiler.request) if in_main_thread else None
    try:
        yield profiler
    finally:
        if in_main_thread:
            signal.signal(signal.SIGUSR1, previous)
        profiler.close()
