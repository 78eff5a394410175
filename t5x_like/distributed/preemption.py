"""Preemption: SIGTERM, SIGINT and notices of the cloud ask the training loop to save and exit, in all processes before
the same step.

A second signal ends the process at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Protocol

import jax

from t5x_like.distributed.coordination import (
    KeyWatcher,
    max_wait_seconds,
    set_value,
    set_value_if_absent,
    unique_key,
    wait_for_value,
)


class StopRequest(Protocol):
    """Request to stop, made to this process or to another one."""

    @property
    def reason(self) -> str | None:
        """Reason of the request; None if there is no request."""

    def reached(self, step: int) -> bool:
        """Return whether to stop before this step. The loop asks for every step, in order."""


class SignalStop:
    """Stop request made to this process by a signal or a notice; the object is the signal handler.

    Attributes:
      signal: The signal.
      notice: Description of a notice that the machine will be stopped.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.notice: str | None = None

    @property
    def reason(self) -> str | None:
        """Notice or name of the signal; None if there was none."""
        return self.notice if self.notice is not None or self.signal is None else self.signal.name

    def reached(self, step: int) -> bool:
        """Return whether there was a request: the process stops before any step."""
        return self.reason is not None

    def notify(self, notice: str) -> None:
        """Request to stop because of a notice."""
        self.notice = notice

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            # Without clean-up: the user asks a second time because the first request hangs. 128 + n is the shell's code
            # for death by signal n.
            os._exit(128 + number)
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[SignalStop]:
    """Turn the first SIGTERM or SIGINT within the context into a request that the loop polls."""
    request = SignalStop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, request) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _CoordinatedStop:
    """Stop of all processes before the same step, whichever of them was asked to stop.

    The steps before need no communication. Once a process has been asked, each process proposes the first step that its
    loop has not asked about yet, and does not pass that step before the maximum of all proposals is known: all
    processes stop there. No process can have passed the maximum, because each waits at its own proposal.
    """

    def __init__(self, local: StopRequest):
        self._local = local
        self._key = unique_key("stop")
        self._lock = threading.Lock()
        self._last_step, self._proposal, self._agreed = -1, -1, -1
        self._published = False
        self._reason: str | None = None
        self._is_agreed = threading.Event()
        self._watch = KeyWatcher(f"{self._key}/asked", self._propose)

    @property
    def reason(self) -> str | None:
        return self._reason or self._local.reason

    def reached(self, step: int) -> bool:
        if self._local.reason is not None and not self._published:
            self._published = True
            # Several processes may be signalled at once, as by SLURM; the first request counts.
            set_value_if_absent(f"{self._key}/asked", self._local.reason)
        with self._lock:
            self._last_step = max(self._last_step, step)
            # The common case: a comparison of numbers, without communication.
            if self._proposal < 0 or step < self._proposal:
                return False
        if not self._is_agreed.wait(max_wait_seconds()):
            raise TimeoutError("timed out waiting for the step before which all processes stop")
        return step >= self._agreed

    def close(self) -> None:
        self._watch.close()

    def _propose(self, reason: str) -> None:
        with self._lock:
            self._reason = reason
            # Under the lock, because the loop may be asking about a step at this moment.
            self._proposal = self._last_step + 1
        set_value(f"{self._key}/step/{jax.process_index()}", str(self._proposal))
        if jax.process_index() == 0:
            steps = [int(wait_for_value(f"{self._key}/step/{index}")) for index in range(jax.process_count())]
            # The maximum: a process that is behind catches up to it, while none can go back.
            set_value(f"{self._key}/agreed", str(max(steps)))
        self._agreed = int(wait_for_value(f"{self._key}/agreed"))
        self._is_agreed.set()


@contextlib.contextmanager
def coordinated_stop(local: StopRequest) -> Iterator[StopRequest]:
    """Turn a request to stop any process into one that stops all processes before the same step."""
    if jax.process_count() == 1:
        yield local
        return
    stop = _CoordinatedStop(local)
    try:
        yield stop
    finally:
        stop.close()
