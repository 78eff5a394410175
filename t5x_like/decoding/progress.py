"""How far a file of prompts is: a bar on a terminal, a line now and then anywhere else, with the time that is left."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from t5x_like.monitoring import formats

INTERVAL_SECONDS = 30.0
"""Between two lines where there is no terminal."""


class RowProgress:
    """Counts answers. Those that were there before count as done and not for the rate."""

    def __init__(self, total: int, done: int, *, console: Console):
        self._total, self._done, self._before = total, done, done
        self._console = console
        self._start = self._said = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("generating", total=total, completed=done)
            self._bar.start()
        elif done:
            console.print(f"generate: {done:,} of {total:,} rows are there already", soft_wrap=True)

    def advance(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif time.monotonic() - self._said >= INTERVAL_SECONDS:
            self._said = time.monotonic()
            self._console.print(self._line(), soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _line(self) -> str:
        rate = (self._done - self._before) / max(time.monotonic() - self._start, 1e-9)
        left = formats.duration((self._total - self._done) / rate) if rate > 0 else "–"
        return f"generate: {self._done:,} of {self._total:,} rows, {formats.number(rate, 3)} rows/s, {left} left"
