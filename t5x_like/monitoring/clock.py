"""Where the wall-clock time goes: at each moment a run is in exactly one named state."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, get_args

State = Literal["init", "compile", "data_wait", "step", "save", "eval"]
STATES: tuple[State, ...] = get_args(State)


class Clock:
    """Splits time into states; starts in "init".

    Steps run asynchronously on the device, so "step" is the time in which the host had nothing else to do, which is
    how long the device kept it waiting.
    """

    def __init__(self, *, now: Callable[[], float] = time.monotonic):
        """Starts the clock.

        Args:
          now: Seconds that never run backwards.
        """
        self._now = now
        self._state: State = "init"
        self._since = now()
        self._totals: dict[str, float] = dict.fromkeys(STATES, 0.0)
        self._lap_start = dict(self._totals)

    def go_on(self, before: Mapping[str, float]) -> None:
        """Adds the seconds that earlier processes of the same run spent (`totals`, from the checkpoint)."""
        for state in STATES:
            seconds = float(before.get(state, 0.0))
            self._totals[state] += seconds
            self._lap_start[state] += seconds

    @contextlib.contextmanager
    def state(self, name: State) -> Iterator[None]:
        """In the state `name`, then back in the one before."""
        previous = self._state
        self.enter(name)
        try:
            yield
        finally:
            self.enter(previous)

    def enter(self, name: State) -> None:
        """In the state `name` from now on."""
        if name not in STATES:
            raise ValueError(f"found the state {name!r}, expected one of {', '.join(STATES)}")
        now = self._now()
        self._totals[self._state] += now - self._since
        self._state, self._since = name, now

    def totals(self) -> dict[str, float]:
        """Seconds by state so far."""
        self.enter(self._state)
        return dict(self._totals)

    def lap(self) -> dict[str, float]:
        """Seconds by state since the last lap, or since the start of this process."""
        totals = self.totals()
        seconds: dict[str, float] = {state: totals[state] - self._lap_start[state] for state in STATES}
        self._lap_start = totals
        return seconds


def goodput(seconds: Mapping[str, float]) -> float:
    """Share of the time in which steps ran; NaN for no time at all."""
    total = sum(seconds.values())
    return seconds.get("step", 0.0) / total if total > 0 else float("nan")
