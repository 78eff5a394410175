"""Sweep: one run for each arm, all evaluated in the same way, and the arms in the order of a metric with intervals.

Each arm is a process of `t5x-like train` on a run directory of its own. The same command again resumes a sweep:
finished runs are recognized, and a further value adds its runs only.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.errors import EXIT_OK, EXIT_REFUSED, RESTART_CODES, ConfigError, ConfigProblem
from t5x_like.evaluation import comparison
from t5x_like.evaluation.comparison import EvaluatedCheckpoint, MetricCell, MetricRow
from t5x_like.evaluation.results_store import BITS_BOUND
from t5x_like.launching.restart_loop import RESTART_DELAY_SECONDS, Supervisor
from t5x_like.reports.comparison_page import write_comparison
from t5x_like.storage import locations
from t5x_like.storage.locations import Location
from t5x_like.storage.mirror import fetch, path_to_read
from t5x_like.studies.sweep_arms import Arm
from t5x_like.utils import formatting
from t5x_like.utils.console import Console
from t5x_like.utils.sanitize import say

PAGE = "comparison.html"
MAX_RESTARTS = 3
"""Restarts of an arm after exit codes with which the same command resumes."""


def arm_path(workdir: Location, arm: Arm) -> Path:
    """Return the local directory of an arm's run: of one in an object store, a copy that is brought up to date.

    Raises:
      UserError: there is no run at the URL, or the object store cannot be accessed.
    """
    directory = path_to_read(str(workdir / arm.name), "--workdir")
    fetch(directory)
    return directory


def train_arms(
    recipe: str, arms: Sequence[Arm], workdir: Location, further: Sequence[str] = ()
) -> tuple[int, list[Arm]]:
    """Train all arms, one after the other, and evaluate those that are not evaluated yet.

    Args:
      recipe: RECIPE as the user named it.
      arms: The arms.
      workdir: Directory or URL of the sweep, in which each arm has a run directory.
      further: Further options of both `train` and `eval`.

    Returns:
      The exit code of the first command that fails, or 0; and the arms to compare. An arm that ends with EXIT_REFUSED,
      as one whose loss is no longer finite, is left out, and the others are trained. None are left after another error.
    """
    finished = []
    for number, arm in enumerate(arms, 1):
        say(f"arm {number} of {len(arms)}: {arm.name}")
        code = _run(["train", recipe, "--workdir", str(workdir / arm.name), *further, "--", *arm.overrides])
        if code == EXIT_REFUSED:
            say(f"arm {arm.name} is left out of the comparison: exit code {code}")
        elif code != EXIT_OK:
            return code, []
        else:
            finished.append(arm)
    # Training evaluates the last step, but does not save the draws that intervals are computed from.
    missing = [str(workdir / arm.name) for arm in finished if not _has_draws(arm_path(workdir, arm))]
    code = _run(["eval", *missing, *further]) if missing else EXIT_OK
    if code != EXIT_OK:
        return code, []
    return (EXIT_OK if len(finished) == len(arms) else EXIT_REFUSED), finished


def _has_draws(directory: Path) -> bool:
    """Return whether the newest evaluated step of a run has the draws that intervals are computed from."""
    try:
        return bool(comparison.read_checkpoint(CheckpointRef(directory)).draws)
    except ConfigError:
        return False


def _run(arguments: Sequence[str]) -> int:
    command = [sys.executable, "-m", "t5x_like", *arguments]
    supervisor = Supervisor(
        command, max_restarts=MAX_RESTARTS, restart_codes=RESTART_CODES, seconds=RESTART_DELAY_SECONDS
    )
    return supervisor.run()


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """Arms by a metric, the best first.

    Attributes:
      metric: Name of the metric.
      checkpoints: The evaluated runs.
      cells: Value, interval and difference from the best of each.
    """

    metric: str
    checkpoints: tuple[EvaluatedCheckpoint, ...]
    cells: tuple[MetricCell, ...]

    @property
    def not_worse(self) -> list[EvaluatedCheckpoint]:
        """Arms scored on the same text that are not significantly worse than the best: the interval of the difference
        contains 0, or there is none."""
        pairs = zip(self.checkpoints[1:], self.cells[1:], strict=True)
        return [checkpoint for checkpoint, cell in pairs if not cell.verdict and not cell.other_text]


def sweep_result(arms: Sequence[Arm], workdir: Location, metric: str | None = None) -> SweepResult:
    """Return the arms in the order of a metric of their newest evaluated steps.

    Args:
      metric: Name of the metric; None: bits per byte, or their bound, or else the loss of the only objective.

    Raises:
      ConfigError: an arm is not evaluated, or the arms do not all have the metric.
    """
    checkpoints = [comparison.read_checkpoint(CheckpointRef(arm_path(workdir, arm))) for arm in arms]
    shared = [name for name in checkpoints[0].values if all(name in each.values for each in checkpoints)]
    usual = [name for name in ("bits_per_byte", BITS_BOUND) if name in shared]
    losses = [name for name in shared if name.startswith("loss/")]
    chosen = metric or next(iter(usual or (losses if len(losses) == 1 else [])), None)
    if chosen is None or chosen not in shared:
        found = "no metric that is the usual one" if chosen is None else f"{chosen}, which not all arms have"
        raise ConfigError([ConfigProblem("--metric", found, f"one of {', '.join(shared) or 'none'}")])
    highest_first = not comparison.lower_is_better(chosen)
    ordered = sorted(checkpoints, key=lambda each: each.values[chosen], reverse=highest_first)
    row: MetricRow = next(row for row in comparison.compare(ordered) if row.name == chosen)
    return SweepResult(chosen, tuple(ordered), row.cells)


def report(result: SweepResult, workdir: Location, console: Console) -> Location:
    """Print the arms and the best of them, and write the page that compares them; return its path."""
    table = Table(title=f"{result.metric} of {len(result.checkpoints):,} arms, the best first")
    table.add_column("arm", overflow="fold")
    for name in ("value", "95 %", "minus best", "95 %"):
        table.add_column(name, justify="right")
    table.add_column("")
    for checkpoint, cell in zip(result.checkpoints, result.cells, strict=True):
        difference = "" if cell.difference is None else f"{cell.difference:+.4f}"
        table.add_row(
            checkpoint.path.name,
            formatting.number(checkpoint.values[result.metric]),
            _interval(cell.interval),
            difference,
            _interval(cell.difference_interval),
            "other text" if cell.other_text else cell.verdict,
        )
    console.print(table)
    best, cell = result.checkpoints[0], result.cells[0]
    around = f", 95 % {_interval(cell.interval)}" if cell.interval else ""
    say(f"best: {best.path.name}, {result.metric} {formatting.number(best.values[result.metric])}{around}")
    close = [checkpoint.path.name for checkpoint in result.not_worse]
    if close:
        say(f"not significantly worse on this text: {', '.join(close)}")
    say("The intervals cover the choice of the held-out text only; sweep a seed as well to see how much seeds differ.")
    shown = result.checkpoints[: comparison.MAX_RUNS]
    if len(shown) < len(result.checkpoints):
        say(f"the page shows the best {len(shown)} arms")
    references = [CheckpointRef(each.path, (each.step,)) for each in shown]
    if isinstance(workdir, Path):
        return write_comparison(references, workdir / PAGE)
    with tempfile.TemporaryDirectory() as temporary:
        page = write_comparison(references, Path(temporary) / PAGE)
        locations.write_bytes(workdir / PAGE, page.read_bytes())
    return workdir / PAGE


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"[{formatting.number(interval[0])}, {formatting.number(interval[1])}]"
