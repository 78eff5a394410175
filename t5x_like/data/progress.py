"""How far preparing is and how fast it goes."""

from __future__ import annotations

import time
from collections.abc import Callable

import rich.console
import rich.progress

Report = Callable[[str], None]


class Meter:
    """A live bar on a terminal, or else a line every few seconds: documents, tokens, tokens per second, time left."""

    def __init__(self, report: Report, total: int, every_seconds: float = 5.0):
        """`total`: the measure of the whole work, of which `add` tells how much was done."""
        self._report = report
        self._total = max(total, 1)
        self._every = every_seconds
        self._start = self._last = time.monotonic()
        self._documents = self._tokens = self._done = 0
        self._bar: rich.progress.Progress | None = None

    def __enter__(self) -> Meter:
        console = rich.console.Console(stderr=True)
        if console.is_terminal:
            columns = ("{task.description}", rich.progress.BarColumn(), rich.progress.TimeRemainingColumn())
            self._bar = rich.progress.Progress(*columns, console=console, transient=True)
            self._bar.add_task("", total=self._total)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def add(self, documents: int, tokens: int, done: int) -> None:
        self._documents += documents
        self._tokens += tokens
        self._done += done
        now = time.monotonic()
        elapsed = max(now - self._start, 1e-3)
        text = f"{self._documents:,} documents, {self._tokens:,} tokens, {self._tokens / elapsed:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._bar.task_ids[0], description=text, completed=min(self._done, self._total))
        elif now - self._last >= self._every:
            self._last = now
            share = min(self._done / self._total, 1.0)
            self._report(text + (f", {elapsed / share - elapsed:,.0f} s left" if share else ""))
