"""Progress of a run: a live line on a terminal, one plain line per interval elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

import rich.console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from t5x_like.utils import formatting
from t5x_like.utils.console import Console
from t5x_like.utils.sanitize import visible


class Progress:
    """Progress display. It is a `Writer` of metrics; `advance` and `status` update the live line between them."""

    def __init__(self, total_steps: int, *, console: Console, step: int = 0):
        """Start the display.

        Args:
          total_steps: Step at which the run ends.
          console: Destination. Text that is printed or logged through the same console appears above the live line.
          step: Number of steps already taken.
        """
        self._total = total_steps
        self._console = console
        self._step = step
        self._status = ""
        self._values: Mapping[str, float] = {}
        self._live: Live | None = None
        if console.is_terminal:
            # On a small machine a redraw takes time from the main thread; four per second are enough for a reader.
            self._live = Live(self, console=console, refresh_per_second=4)
            self._live.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Show metrics: "loss", "tokens_per_second", "mfu" and "step_time_s", as far as they are given."""
        self._values = {**self._values, **values}
        self._step = max(self._step, step)
        if self._live is None:
            self._console.print(Text(self._line(step)), soft_wrap=True)

    def advance(self, step: int) -> None:
        """Set the number of steps dispatched."""
        self._step = step

    def status(self, text: str) -> None:
        """Show what the process does besides steps, such as "saving step 200"; an empty text clears it."""
        text = visible(text)
        if self._live is None and text and text != self._status:
            self._console.print(Text(f"step {self._step}/{self._total}  {text}"), soft_wrap=True)
        self._status = text

    def note(self, text: str) -> None:
        """Print a line that stays, such as the scores of an evaluation, and clear the status."""
        self._console.print(Text(f"step {self._step}/{self._total}  {visible(text)}"), soft_wrap=True)
        self._status = ""

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> rich.console.RenderResult:
        line = Table.grid(padding=(0, 2), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1, min_width=4)
        for _ in range(2):
            line.add_column(no_wrap=True, overflow="ellipsis")
        line.add_row(
            Text(f"step {self._step}/{self._total}", style="bold"),
            ProgressBar(total=max(self._total, 1), completed=self._step),
            Text("  ".join(self._figures())),
            Text(self._status, style="dim"),
        )
        yield line

    def _line(self, step: int) -> str:
        return "  ".join([f"step {step}/{self._total}", *self._figures()])

    def _figures(self) -> list[str]:
        values = self._values
        figures = []
        if "loss" in values:
            figures.append(f"loss {formatting.number(values['loss'])}")
        if "tokens_per_second" in values:
            figures.append(f"{formatting.count(values['tokens_per_second'])} tokens/s")
        if "mfu" in values:
            figures.append(f"MFU {formatting.percent(values['mfu'])}")
        if "step_time_s" in values and self._step < self._total:
            figures.append(f"{formatting.duration(values['step_time_s'] * (self._total - self._step))} left")
        return figures
