"""What people see of a run while it goes: a live line on a terminal, one plain line per interval anywhere else."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from t5x_like.monitoring import formats
from t5x_like.monitoring.text import visible


class Progress:
    """A `Writer` for people. Metrics come by `write`; `advance` and `status` keep the live line going between them."""

    def __init__(self, total_steps: int, *, console: Console, step: int = 0):
        """Starts the line.

        Args:
          total_steps: Step at which the run ends.
          console: Where to; what is printed or logged through the same console appears above the live line.
          step: Steps already taken.
        """
        self._total = total_steps
        self._console = console
        self._step = step
        self._status = ""
        self._values: Mapping[str, float] = {}
        self._live: Live | None = None
        if console.is_terminal:
            # A redraw takes the main thread's time on a small machine, and nobody reads faster than this.
            self._live = Live(self, console=console, refresh_per_second=4)
            self._live.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes metrics; "loss", "tokens_per_second", "mfu" and "seconds_per_step" are shown where they are there."""
        self._values = {**self._values, **values}
        self._step = max(self._step, step)
        if self._live is None:
            self._console.print(Text(self._line(step)), soft_wrap=True)

    def advance(self, step: int) -> None:
        """Steps dispatched so far."""
        self._step = step

    def status(self, text: str) -> None:
        """What goes on besides: "compiling", "saving step 200", "saved step 200"; empty for nothing."""
        text = visible(text)
        if self._live is None and text and text != self._status:
            self._console.print(Text(f"step {self._step}/{self._total}  {text}"), soft_wrap=True)
        self._status = text

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
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
            figures.append(f"loss {formats.number(values['loss'])}")
        if "tokens_per_second" in values:
            figures.append(f"{formats.count(values['tokens_per_second'])} tokens/s")
        if "mfu" in values:
            figures.append(f"MFU {formats.percent(values['mfu'])}")
        if "seconds_per_step" in values and self._step < self._total:
            figures.append(f"{formats.duration(values['seconds_per_step'] * (self._total - self._step))} left")
        return figures
