"""How a compiled step is told: tables for people, and a dictionary for files."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from t5x_like.config import RunConfig
from t5x_like.planning.compile import Compiled
from t5x_like.planning.knobs import knobs
from t5x_like.planning.roofline import Roofline, roofline

_BUFFERS, _COLLECTIVES = 8, 12
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_DECODE_KNOBS = (
    "--decode-rows: fewer at once, with less of everything but parameters",
    "--decode-length: shorter rows, with smaller caches",
    "--partitioning.tensor: each layer and its cache over more devices",
)


def print_compiled(run: RunConfig, compiled: Compiled, console: Console) -> None:
    """Prints whether the step fits and what it is made of; of a refused one XLA's words and what can be changed."""
    effort = "effort O0" if compiled.effort == "low" else "default effort"
    axes = ", ".join(f"{axis}={degree}" for axis, degree in compiled.mesh.items() if degree > 1) or "one device"
    console.print(
        f"XLA:TPU compiled the {compiled.step} step ({compiled.work}) for {compiled.topology} ({axes}) in "
        f"{compiled.seconds:.0f} s, {effort}",
        highlight=False,
    )
    if compiled.fits:
        share = compiled.peak_bytes / compiled.limit_bytes
        console.print(
            f"[bold green]fits[/]: peak {readable(compiled.peak_bytes)} of {readable(compiled.limit_bytes)} per "
            f"device ({share:.0%}), {readable(compiled.room_bytes)} left; its arguments are "
            f"{readable(compiled.argument_bytes)} of it",
            highlight=False,
        )
    else:
        console.print(
            f"[bold red]does not fit[/]: needs {readable(compiled.peak_bytes)} of {readable(compiled.limit_bytes)} "
            f"per device, {readable(-compiled.room_bytes)} too much. In XLA's words:",
            highlight=False,
        )
        console.print(f"  {compiled.words.splitlines()[0]}", markup=False, highlight=False)
    for complaint in compiled.complaints:
        console.print(f"[bold yellow]XLA complains[/]: {escape(complaint)}", highlight=False)
    _print_buffers(compiled, console)
    if not compiled.fits:
        console.print("Three knobs to turn:")
        for knob in (knobs(run) if compiled.step == "train" else _DECODE_KNOBS)[:3]:
            console.print(f"  {knob}", markup=False, highlight=False)
        return
    _print_collectives(compiled, console)
    _print_roofline(roofline(compiled), console)


def _print_buffers(compiled: Compiled, console: Console) -> None:
    total = sum(buffer.bytes for buffer in compiled.buffers)
    rest = compiled.buffers[_BUFFERS:]
    console.print(f"Largest buffers at the fullest moment ({readable(total)} alive per device):", highlight=False)
    table = Table()
    table.add_column("bytes", justify="right")
    table.add_column("array")
    table.add_column("where it comes from", overflow="fold")
    for buffer in compiled.buffers[:_BUFFERS]:
        times = f"{buffer.count} x " if buffer.count > 1 else ""
        table.add_row(readable(buffer.bytes), times + buffer.shape.replace("[", r"\["), buffer.place)
    if rest:
        table.add_row(readable(sum(buffer.bytes for buffer in rest)), f"{len(rest)} more", "")
    console.print(table)


def _print_collectives(compiled: Compiled, console: Console) -> None:
    console.print("Collectives of a step, by mesh axis; bytes per device:")
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
            readable(each.bytes),
            readable(each.sent),
        )
    console.print(table)


def _print_roofline(found: Roofline, console: Console) -> None:
    console.print("Roofline, the least seconds of a step by each resource alone. Not a measurement, and no forecast:")
    table = Table()
    for name in found.parts:
        table.add_column(name, justify="right")
    table.add_column("bound by")
    table.add_column("without overlap", justify="right")
    table.add_row(*(f"{seconds:.3g}" for seconds in found.parts.values()), found.bound, f"{found.without_overlap:.3g}")
    console.print(table)


def readable(size: float) -> str:
    """Bytes in the unit that suits them."""
    unit = next((unit for unit in ("GiB", "MiB", "KiB") if abs(size) >= _UNITS[unit]), "KiB")
    return f"{size / _UNITS[unit]:.2f} {unit}"


def as_dict(compiled: Compiled) -> dict[str, Any]:
    """What of a compiled step belongs into a file."""
    found = {
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
        "words": compiled.words,
        "buffers": [dataclasses.asdict(buffer) for buffer in compiled.buffers[:_BUFFERS]],
        "collectives": [dataclasses.asdict(each) for each in compiled.collectives],
        "traffic_bytes": compiled.traffic_bytes,
        "complaints": list(compiled.complaints),
    }
    if compiled.fits:
        found["roofline_seconds"] = roofline(compiled).parts
    return found
