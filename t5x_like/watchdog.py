"""Ends a process that shows no sign of life, so that whoever started it can start it again.

Neither jax nor a scheduler notices a process that hangs: a stuck data thread, a deadlock between programs that differ.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

from t5x_like.config import EXIT_RESUMABLE

_LATER_SECONDS = 60.0


class Watchdog:
    """Waits for `beat` in a thread of its own. When it stays out for too long, the stacks of all threads are printed,
    and the process ends with EXIT_RESUMABLE.

    Behind it stands a timer of the C library, for a thread that holds the interpreter's lock for ever: it prints the
    stacks a minute later and ends the process with exit code 1, the only one it knows.
    """

    def __init__(self, seconds: float | None, last_words: Callable[[str], None], *, patience: float = 1.0):
        """Starts to wait.

        Args:
          seconds: Between two beats at most; None for no watchdog.
          last_words: Called with a sentence before the process ends.
          patience: Of the first beat; see `beat`.
        """
        self._seconds, self._last_words = seconds, last_words
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.beat(patience)
        if seconds is not None:
            self._thread = threading.Thread(target=self._work, args=(seconds,), name="watchdog", daemon=True)
            self._thread.start()

    def beat(self, patience: float = 1.0) -> None:
        """A sign of life. The next one may take `patience` times as long as others: for what is no training step."""
        self._allowed = (self._seconds or 0.0) * patience
        self._since = time.monotonic()

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _work(self, seconds: float) -> None:
        try:
            while not self._stop.wait(min(seconds / 10, 5.0)):
                _end_later(self._allowed + _LATER_SECONDS)
                if time.monotonic() - self._since > self._allowed:
                    self._end()
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _end(self) -> None:
        message = f"no sign of life for {self._allowed:g} seconds; the stacks of all threads are in its output"
        with contextlib.suppress(Exception):
            print(f"t5x-like: {message}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
        with contextlib.suppress(Exception):
            self._last_words(message)
        os._exit(EXIT_RESUMABLE)


def _end_later(seconds: float) -> None:
    # Under a test runner standard error may be no file.
    with contextlib.suppress(Exception):
        faulthandler.dump_traceback_later(seconds, exit=True)
