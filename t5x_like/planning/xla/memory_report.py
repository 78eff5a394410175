"""Memory of a compiled program at its peak, read from the reports that XLA dumps beside a compilation.

Two reports are used: `*memory-usage-report.txt`, the bytes allocated in each memory space, and `*live-range.txt`, the
values that are alive at the peak. XLA writes both also if it refuses the program for its size.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

from t5x_like.planning.xla import compiler_formats
from t5x_like.planning.xla.hlo_text import whole_lines


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Bytes of one device that are alive at the peak.

    Attributes:
      origin: Path in the state or batch for an argument; for other arrays the operation in the traced program, or the
        name of the operation if XLA created it.
      shape: Shape of a device's shard, as in `bf16[32,8,512,4096]`.
      count: Number of buffers with the same origin and shape.
      bytes: Bytes of all of them.
    """

    origin: str
    shape: str
    count: int
    bytes: int


def allocated_bytes(dump: Path) -> int | None:
    """Return the bytes allocated in the device's main memory, with tiles, gaps and arguments; None without a report."""
    for report in sorted(dump.glob("*memory-usage-report.txt")):
        for _, color, total in compiler_formats.ALLOCATED_TOTAL.findall(report.read_text()):
            if color == "0":
                return int(total)
    return None


def live_at_peak(dump: Path) -> list[Buffer]:
    """Return the buffers that are alive at the peak, largest first; an empty list without XLA's reports.

    Values that share memory, such as the input, the carry and the result of a loop, are one buffer. It is named after
    the value with the most detailed origin.
    """
    suffixes = ("-live-range", "-buffer-assignment", "")
    reports = [sorted(dump.glob(f"*after_optimizations{suffix}.txt")) for suffix in suffixes]
    if not all(reports):
        return []
    live_range, assignment, program = (paths[0].read_text() for paths in reports)
    origins = _origins(program)
    layout = _layout(assignment)
    by_address: dict[tuple[int, int], tuple[str, _Value]] = {}
    for line in live_range.partition(compiler_formats.PEAK_HEADER)[2].splitlines():
        live = compiler_formats.LIVE_VALUE.match(line)
        if live is None:
            break
        value = layout.get(live[1] + live[2])
        if value is None:
            continue
        origin, known = origins.get(live[1], ""), by_address.get(value.address)
        if known is None or len(origin) > len(origins.get(known[0], "")):
            by_address[value.address] = (live[1], value)
    buffers: dict[tuple[str, str], Buffer] = {}
    for name, value in by_address.values():
        origin = origins.get(name) or re.sub(r"[.\d]+$", "", name)
        total = buffers.get((origin, value.shape), Buffer(origin, value.shape, 0, 0))
        buffers[origin, value.shape] = Buffer(origin, value.shape, total.count + 1, total.bytes + value.bytes)
    return sorted(buffers.values(), key=lambda buffer: -buffer.bytes)


def _origins(program: str) -> dict[str, str]:
    """Return the operation of each instruction in the traced program, as far as XLA knows it."""
    matches = (compiler_formats.INSTRUCTION_OP_NAME.match(line) for line in whole_lines(program))
    return {match[1]: readable_op_name(match[2]) for match in matches if match}


class _Value(NamedTuple):
    """Value in XLA's memory layout; `address` is (allocation, offset)."""

    address: tuple[int, int]
    bytes: int
    shape: str


def _layout(assignment: str) -> dict[str, _Value]:
    """Return the values of the device's main memory by name and index, `while.49{2}`."""
    values = {}
    number, main = -1, False
    for line in assignment.splitlines():
        if head := compiler_formats.ALLOCATION.match(line):
            # Allocations without a color are in the main memory.
            number, main = int(head[1]), head[2] is None
        elif main and (value := compiler_formats.ALLOCATED_VALUE.match(line)):
            values[value[1] + (value[2] or "{}")] = _Value((number, int(value[4])), int(value[3]), value[5])
    return values


def readable_op_name(op_name: str) -> str:
    """Return a readable form of JAX's name of an operation.

    `state['params']['head']['kernel']` becomes `params/head/kernel`, and `jit(train)/jvp()/while/body/dot_general`
    becomes `forward/while/body/dot_general`.
    """
    op_name = op_name.replace("\\'", "'")
    if keys := compiler_formats.ARGUMENT_KEY.findall(op_name):
        moments = re.search(r"\]\.(\w+)\[", op_name)
        return "/".join([*keys[:1], *([moments[1]] if moments else []), *keys[1:]])
    parts = [part for part in op_name.split("/") if not part.startswith("jit(")]
    readable = {"jvp()": "forward", "transpose(jvp())": "backward"}
    return "/".join(readable.get(part, part) for part in parts if part != "closed_call")
