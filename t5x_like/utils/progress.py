"""Progress display for a known amount of work. Training has its own live line (`monitoring.progress_bar`)."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from t5x_like.utils import formatting
from t5x_like.utils.console import Console
from t5x_like.utils.stall_limit import progress


class ProgressDisplay:
    """Bar on a terminal, otherwise a line of text at intervals, both with the remaining time. A context manager."""

    def __init__(
        self,
        total: int,
        text: str,
        *,
        console: Console | None = None,
        report: Callable[[str], None] | None = None,
        interval_seconds: float = 30.0,
        done: int = 0,
    ):
        """
        Args:
          total: Total amount of work, in any unit.
          text: Description of the work, shown in front of the bar.
          console: Console of the bar; by default standard error.
          report: Receives the lines if the console is not a terminal. None: no lines.
          interval_seconds: Minimum time between two lines.
          done: Amount that an earlier process has done. It does not count for the rate.
        """
        self._total = max(total, 1)
        self._done = self._initially_done = done
        self._report = report
        self._interval = interval_seconds
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        console = console or Console(stderr=True)
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(text, total=self._total, completed=done)

    @property
    def seconds(self) -> float:
        """Seconds since the start, above 0."""
        return max(time.monotonic() - self._start, 1e-3)

    def __enter__(self) -> ProgressDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, amount: int, text: str | None = None) -> None:
        """Add `amount` to the work that is done.

        Args:
          amount: Work since the last call.
          text: New description of the state; without one, no line is reported.
        """
        progress()
        self._done += amount
        if self._bar is not None:
            self._bar.update(self._task, completed=min(self._done, self._total), description=text)
        elif self._report is not None and text is not None and time.monotonic() - self._last_line >= self._interval:
            self._last_line = time.monotonic()
            self._report(f"{text}, {self._time_left()} left")

    def advance_to(self, done: int) -> None:
        """Set the amount of work that is done."""
        self.advance(done - self._done)

    def _time_left(self) -> str:
        rate = (self._done - self._initially_done) / self.seconds
        return formatting.duration(max(self._total - self._done, 0) / rate) if rate > 0 else "–"


class RowProgress(ProgressDisplay):
    """Progress of output rows: rows done, rows per second and the remaining time."""

    def __init__(self, total: int, done: int = 0, *, label: str, console: Console | None = None):
        """
        Args:
          total: Number of rows.
          done: Rows of an earlier process.
          label: Name of the command or of the work.
          console: Console of bar and lines; by default standard error.
        """
        console = console or Console(stderr=True)
        super().__init__(
            total, label, console=console, done=done, report=lambda line: console.print(line, soft_wrap=True)
        )
        self._rows, self._label = total, label
        if done and not console.is_terminal:
            console.print(f"{label}: {done:,} of {total:,} rows exist already", soft_wrap=True)

    def advance(self, amount: int, text: str | None = None) -> None:
        rate = (self._done + amount - self._initially_done) / self.seconds
        figures = f"{self._done + amount:,} of {self._rows:,} rows, {formatting.number(rate, 3)} rows/s"
        super().advance(amount, text or f"{self._label}: {figures}")
