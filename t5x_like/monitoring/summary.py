"""The table at the start of a run: what will be computed, where, and whether it goes on from a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from t5x_like.monitoring import formats
from t5x_like.monitoring.text import visible


@dataclasses.dataclass(frozen=True)
class Part:
    """Parameters of one part of the model, and their bytes over all devices."""

    parameters: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class StartSummary:
    """What there is to say before the first step.

    Attributes:
      name: Of the run.
      model: Its architecture in a few words.
      run_dir: Run directory.
      resume: The decision, in words: "new run", "resumes from step 400 of 2000".
      parts: Parameters by part of the model.
      total_steps: Step at which the run ends.
      tokens_per_step: Cells of a global batch that are no padding, at most.
      flops_per_step: Model FLOPs of a training step.
      memory: Estimated bytes per device by purpose ("parameters", "optimizer state", "activations").
      devices: Kind and number.
      mesh: Size of each mesh axis.
      versions: Of Python and the packages that decide the numbers.
    """

    name: str
    model: str
    run_dir: str
    resume: str
    parts: Mapping[str, Part]
    total_steps: int
    tokens_per_step: int
    flops_per_step: float
    memory: Mapping[str, int]
    devices: str
    mesh: Mapping[str, int]
    versions: Mapping[str, str]


def print_summary(summary: StartSummary, console: Console) -> None:
    """Prints two tables: the run, and its parameters by part."""
    console.print(_run_table(summary))
    console.print(_parameter_table(summary.parts))


def _run_table(summary: StartSummary) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_header=False, title_justify="left", pad_edge=False)
    table.title = Text(visible(summary.name), style="bold")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    axes = " x ".join(f"{size} {axis}" for axis, size in summary.mesh.items() if size > 1)
    memory = ", ".join(f"{purpose} {formats.size(size)}" for purpose, size in summary.memory.items())
    total_tokens = formats.count(summary.tokens_per_step * summary.total_steps)
    rows = {
        "run directory": f"{summary.run_dir} ({summary.resume})",
        "model": summary.model,
        "tokens": f"{formats.count(summary.tokens_per_step)} per step, {total_tokens} in {summary.total_steps:,} steps",
        "compute": f"{formats.flops(summary.flops_per_step)} per step",
        "memory": f"{memory}; in all {formats.size(sum(summary.memory.values()))} per device (estimate)",
        "devices": f"{summary.devices}; mesh {axes or 'of one device'}",
        "versions": ", ".join(f"{package} {version}" for package, version in summary.versions.items()),
    }
    for name, value in rows.items():
        table.add_row(name, Text(visible(value)))
    return table


def _parameter_table(parts: Mapping[str, Part]) -> Table:
    total = Part(sum(part.parameters for part in parts.values()), sum(part.bytes for part in parts.values()))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column("parameters", Text("total"))
    table.add_column("count", Text(f"{total.parameters:,}"), justify="right")
    table.add_column("", Text(formats.count(total.parameters)), justify="right")
    table.add_column("bytes", Text(formats.size(total.bytes)), justify="right")
    for name, part in parts.items():
        count = f"{part.parameters:,}"
        table.add_row(Text(visible(name)), count, formats.count(part.parameters), formats.size(part.bytes))
    return table
