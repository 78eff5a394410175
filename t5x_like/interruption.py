"""Stopping on purpose: SIGTERM and SIGINT ask the loop to save and leave; a second signal leaves at once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType


class Interruption:
    """Whether a signal has asked the process to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def reason(self) -> str | None:
        """The signal's name; None if there was none."""
        return None if self.signal is None else self.signal.name

    def reached(self, step: int) -> bool:
        """Whether to stop in front of this step: of any, once there was a signal."""
        return self.signal is not None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def interruption() -> Iterator[Interruption]:
    """Turns the first SIGTERM or SIGINT within the block into a request that the loop polls."""
    request = Interruption()
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, request) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
