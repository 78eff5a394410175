"""Wall-clock time by state: at each moment a run is in exactly one named state."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, get_args

State = Literal["init", "restore", "compile", "data_wait", "step", "save", "eval"]
STATES: tuple[State, ...] = get_args(State)


class TimeTracker:
    """Clock that splits time into states; it starts in "init".

    Steps run asynchronously on the device. So "step" is the time in which the host had nothing else to do, which is the
    time that it waited for the device.
    """

    def __init__(self, *, now: Callable[[], float] = time.monotonic):
        """Start the clock.

        Args:
          now: Function that returns monotonic seconds.
        """
        self._now = now
        self._state: State = "init"
        self._since = now()
        # One attribute, since another thread reads both parts.
        self._visit: tuple[State, float] = ("init", self._since)
        self._visits: dict[State, tuple[float, int]] = dict.fromkeys(STATES, (0.0, 0))
        self._totals: dict[str, float] = dict.fromkeys(STATES, 0.0)
        self._lap_start = dict(self._totals)

    def go_on(self, before: Mapping[str, float]) -> None:
        """Add the seconds that earlier processes of the same run spent (`totals`, from the checkpoint)."""
        for state in STATES:
            seconds = float(before.get(state, 0.0))
            self._totals[state] += seconds
            self._lap_start[state] += seconds

    @contextlib.contextmanager
    def state(self, name: State) -> Iterator[None]:
        """Set the state to `name` within the context, and restore the previous state after it."""
        previous = self._state
        self.enter(name)
        try:
            yield
        finally:
            self.enter(previous)

    def enter(self, name: State) -> None:
        """Switch to the state `name`."""
        if name not in STATES:
            raise ValueError(f"found the state {name!r}, expected one of {', '.join(STATES)}")
        self._account()
        left, since = self._visit
        longest, visits = self._visits[left]
        self._visits[left] = (max(longest, self._since - since), visits + 1)
        self._state, self._visit = name, (name, self._since)

    def current(self) -> tuple[State, float]:
        """Return the state and the seconds since it was entered. Any thread may call this."""
        state, since = self._visit
        return state, self._now() - since

    def longest_visit(self, name: State) -> tuple[float, int]:
        """Return the seconds of the longest visit of a state that has ended, and the number of such visits."""
        return self._visits[name]

    def totals(self) -> dict[str, float]:
        """Return the seconds by state so far."""
        self._account()
        return dict(self._totals)

    def _account(self) -> None:
        now = self._now()
        self._totals[self._state] += now - self._since
        self._since = now

    def lap(self) -> dict[str, float]:
        """Return the seconds by state since the last lap, or since the start of this process."""
        totals = self.totals()
        seconds: dict[str, float] = {state: totals[state] - self._lap_start[state] for state in STATES}
        self._lap_start = totals
        return seconds


def goodput(seconds: Mapping[str, float]) -> float:
    """Return the share of the time in which steps ran; NaN if no time has passed."""
    total = sum(seconds.values())
    return seconds.get("step", 0.0) / total if total > 0 else float("nan")


def lost_time(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the share of the time in each other state than "step": the reasons for which the goodput is below 1."""
    total = sum(seconds.values())
    return {f"lost_time/{state}": seconds.get(state, 0.0) / total for state in STATES if state != "step" and total > 0}
