"""Report of a compiled step: tables for the console, and a dictionary for files."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.markup import escape
from rich.table import Table

from t5x_like.config import RunConfig
from t5x_like.planning.memory_suggestions import memory_suggestions
from t5x_like.planning.xla.aot_compile import CompiledStep
from t5x_like.planning.xla.roofline import Roofline, roofline
from t5x_like.utils import formatting
from t5x_like.utils.console import Console

_BUFFERS, _COLLECTIVES = 8, 12
_DECODE_SUGGESTIONS = (
    "--decode-rows: fewer rows at once need less of everything except parameters",
    "--decode-length: shorter rows need smaller caches",
    "--sharding.tensor: each layer and its cache are split over more devices",
)


def print_compiled(run: RunConfig, compiled: CompiledStep, console: Console) -> None:
    """Print whether the step fits and what it consists of; for a refused step, XLA's error and suggestions."""
    effort = "effort O0" if compiled.effort == "low" else "default effort"
    axes = ", ".join(f"{axis}={degree}" for axis, degree in compiled.mesh.items() if degree > 1) or "one device"
    console.print(
        f"XLA:TPU compiled the {compiled.step} step ({compiled.work}) for {compiled.topology} ({axes}) in "
        f"{compiled.seconds:.0f} s, {effort}",
        highlight=False,
    )
    if compiled.fits:
        fraction = compiled.peak_bytes / compiled.limit_bytes
        console.print(
            f"[bold green]fits[/]: peak {formatting.size(compiled.peak_bytes)} of "
            f"{formatting.size(compiled.limit_bytes)} per device ({fraction:.0%}), "
            f"{formatting.size(compiled.free_bytes)} left; {formatting.size(compiled.argument_bytes)} of it are the "
            "arguments",
            highlight=False,
        )
        if compiled.host_bytes:
            console.print(f"memory of the host: {formatting.size(compiled.host_bytes)} per device", highlight=False)
    else:
        console.print(
            f"[bold red]does not fit[/]: needs {formatting.size(compiled.peak_bytes)} of "
            f"{formatting.size(compiled.limit_bytes)} per device, {formatting.size(-compiled.free_bytes)} too much. "
            "XLA's error:",
            highlight=False,
        )
        console.print(f"  {compiled.error.splitlines()[0]}", markup=False, highlight=False)
    for warning in compiled.warnings:
        console.print(f"[bold yellow]XLA's warning[/]: {escape(warning)}", highlight=False)
    _print_buffers(compiled, console)
    if not compiled.fits:
        console.print("Change one of:")
        for suggestion in (memory_suggestions(run) if compiled.step == "train" else _DECODE_SUGGESTIONS)[:3]:
            console.print(f"  {suggestion}", markup=False, highlight=False)
        return
    _print_collectives(compiled, console)
    _print_roofline(roofline(compiled), console)


def _print_buffers(compiled: CompiledStep, console: Console) -> None:
    total = sum(buffer.bytes for buffer in compiled.buffers)
    rest = compiled.buffers[_BUFFERS:]
    console.print(f"Largest buffers at the peak ({formatting.size(total)} alive per device):", highlight=False)
    table = Table()
    table.add_column("bytes", justify="right")
    table.add_column("array")
    table.add_column("origin", overflow="fold")
    for buffer in compiled.buffers[:_BUFFERS]:
        times = f"{buffer.count} x " if buffer.count > 1 else ""
        table.add_row(formatting.size(buffer.bytes), times + buffer.shape.replace("[", r"\["), buffer.origin)
    if rest:
        table.add_row(formatting.size(sum(buffer.bytes for buffer in rest)), f"{len(rest)} more", "")
    console.print(table)


def _print_collectives(compiled: CompiledStep, console: Console) -> None:
    console.print("Collectives per step, by mesh axis; bytes per device:")
    table = Table()
    for name in ("kind", "axes", "over"):
        table.add_column(name)
    for name in ("count", "arrays", "sent"):
        table.add_column(name, justify="right")
    for each in compiled.collectives[:_COLLECTIVES]:
        over = f"{each.slices} slices" if each.slices > 1 else "links"
        table.add_row(
            each.kind,
            ", ".join(each.axes) or "none",
            over,
            str(each.count),
            formatting.size(each.bytes),
            formatting.size(each.sent),
        )
    console.print(table)


def _print_roofline(bounds: Roofline, console: Console) -> None:
    console.print("Roofline: minimum seconds per step for each resource alone. Not a measurement or a forecast:")
    table = Table()
    for name in bounds.parts:
        table.add_column(name, justify="right")
    table.add_column("bound by")
    table.add_column("without overlap", justify="right")
    cells = [f"{seconds:.3g}" for seconds in bounds.parts.values()]
    table.add_row(*cells, bounds.bound, f"{bounds.without_overlap:.3g}")
    console.print(table)


def as_dict(compiled: CompiledStep) -> dict[str, Any]:
    """Return a compiled step for a JSON file."""
    document = {
        "step": compiled.step,
        "work": compiled.work,
        "seconds": round(compiled.seconds, 1),
        "executed_flops": compiled.executed_flops,
        "topology": str(compiled.topology),
        "mesh": dict(compiled.mesh),
        "effort": compiled.effort,
        "fits": compiled.fits,
        "limit_bytes": compiled.limit_bytes,
        "peak_bytes": compiled.peak_bytes,
        "argument_bytes": compiled.argument_bytes,
        "host_bytes": compiled.host_bytes,
        "error": compiled.error,
        "buffers": [dataclasses.asdict(buffer) for buffer in compiled.buffers[:_BUFFERS]],
        "collectives": [dataclasses.asdict(each) for each in compiled.collectives],
        "traffic_bytes": compiled.traffic_bytes,
        "warnings": list(compiled.warnings),
    }
    if compiled.fits:
        document["roofline_seconds"] = roofline(compiled).parts
    return document
