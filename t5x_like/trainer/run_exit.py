"""exit.json of a training process: written however the process ends, except by a kill."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Protocol

from t5x_like import run_directory
from t5x_like.errors import EXIT_RESUMABLE, PIPE_CLOSED, UserError, exit_code_of, is_broken_pipe
from t5x_like.trainer.process_limit import ProcessLimit
from t5x_like.utils.sanitize import say

_STARTED = time.time()
_IMPORT = "<frozen importlib._bootstrap>"
"""File name of Python's own code that imports modules, as frames have it."""


class _Clock(Protocol):
    def totals(self) -> Mapping[str, float]: ...


class RunExit:
    """End of this process. Only its first reason is recorded, and only if no other process trains in the directory.

    Attributes:
      clock: Clock of the run, once there is one.
      terminated: True after a SIGTERM before training began.
      limit: Limit of the time before and after training.
    """

    def __init__(self, workdir: Path) -> None:
        self.limit = ProcessLimit(workdir, lambda reason: self.record(EXIT_RESUMABLE, reason))
        self.clock: _Clock | None = None
        self.terminated = False
        self._workdir = workdir
        self._process = 0
        self._is_owner = self._is_recorded = False

    def own(self, process: int) -> None:
        """Note that the run of this process holds the lock of the directory; `process` is its index."""
        self._process, self._is_owner = process, True
        if process == 0:
            self.forget_previous()

    def forget_previous(self) -> None:
        """Remove the exit.json of an earlier process, so that it is not attributed to this one if it is killed."""
        path = self._workdir / run_directory.EXIT
        with contextlib.suppress(OSError):
            # Another process of this run may have failed before this one has begun.
            if path.stat().st_mtime < _STARTED:
                self._as_owner(path.unlink)

    def record(self, code: int, reason: str, step: int | None = None) -> None:
        """Write exit.json; a failure to write it is ignored, since it must not hide the reason."""
        if self._is_recorded:
            return
        self._is_recorded = True
        seconds = {} if self.clock is None else self.clock.totals()
        self._as_owner(
            lambda: run_directory.write_exit(
                self._workdir, code=code, reason=reason, step=step, seconds=seconds, process=self._process
            )
        )

    def failed(self, error: BaseException) -> None:
        """Record that `error` ends the process."""
        reason = PIPE_CLOSED if is_broken_pipe(error) else str(error) or repr(error)
        self.record(exit_code_of(error), "stopped by SIGTERM" if self.terminated else reason)

    def _as_owner(self, action: Callable[[], object]) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(UserError, OSError))
            if not self._is_owner:
                stack.enter_context(run_directory.locked(self._workdir))
            action()


@contextlib.contextmanager
def recorded_exit(workdir: Path) -> Iterator[RunExit]:
    """Record in exit.json an error that ends this context; SIGTERM ends it with EXIT_RESUMABLE.

    The context begins before jax is imported. When training begins, it handles the signals itself. A SIGTERM during an
    import ends the process at once, without finalization of the modules that are loaded.
    """
    ending = RunExit(workdir)

    def terminate(number: int, frame: FrameType | None) -> None:
        ending.terminated = True
        say("t5x-like: stopped by SIGTERM", file=sys.stderr)
        stop = SystemExit(EXIT_RESUMABLE)
        if _is_importing(frame):
            # An exception that passes through the initialization of a native module can crash the process.
            ending.failed(stop)
            sys.stdout.flush()
            os._exit(EXIT_RESUMABLE)
        raise stop

    previous = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, terminate)
        ending.forget_previous()
        yield ending
    except BaseException as error:
        startup = sys.modules.get("t5x_like.distributed.startup")
        ending.failed(error if startup is None else startup.translate_error(error))
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
        ending.limit.set("end", None)


def _is_importing(frame: FrameType | None) -> bool:
    """Return whether a frame, or one that called it, imports a module."""
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT:
            return True
        frame = frame.f_back
    return False
