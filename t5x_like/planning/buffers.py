"""The memory of a compiled program: what XLA's own reports, dumped beside a compilation, say lies in it at its fullest.

The dump has two reports of use: `*memory-usage-report.txt`, the bytes that were laid out in each memory, and
`*live-range.txt`, what is alive at the fullest moment. XLA writes both also where the program is refused for its size.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

_TOTAL = re.compile(r"Memory Space: (\S+) \(color=(\d+)\)\nTotal bytes: (\d+)")
_LIVE = re.compile(r"^\s+(\S+?)(\{[\d,]*\}): (\d+) bytes")
_ALLOCATION = re.compile(r"^allocation (\d+): size \d+(, color \d+)?")
_VALUE = re.compile(r"^ value: <\d+ (\S+?)(\{[\d,]*\})? .*\(size=(\d+),offset=(\d+)\): (\S+?\])")
_ARGUMENT = re.compile(r"\['([^']+)'\]")
_OP_NAME = re.compile(r'^\s+(?:ROOT )?%?(\S+) = .*op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Bytes of one device that are alive when the memory is fullest.

    Attributes:
      place: Of an argument its path in the state or batch, of other arrays the place in the traced program, or where
        XLA made them itself the name of the operation.
      shape: As in `bf16[32,8,512,4096]`, of a device's share.
      count: How many there are of the same place and shape.
      bytes: Of all of them.
    """

    place: str
    shape: str
    count: int
    bytes: int


def allocated_bytes(dump: Path) -> int | None:
    """What XLA laid out in the device's main memory, tiles, gaps and arguments included; None without its report."""
    for report in sorted(dump.glob("*memory-usage-report.txt")):
        for _, color, total in _TOTAL.findall(report.read_text()):
            if color == "0":
                return int(total)
    return None


def live_at_peak(dump: Path) -> list[Buffer]:
    """What is alive at the fullest moment, largest first; empty without XLA's reports.

    Values that share a place in memory, as what a loop takes, carries and returns, are one buffer; it has the name of
    the one whose origin is known best.
    """
    reports = [sorted(dump.glob(f"*after_optimizations{end}.txt")) for end in ("-live-range", "-buffer-assignment", "")]
    if not all(reports):
        return []
    live_range, assignment, program = (found[0].read_text() for found in reports)
    places = _places(program)
    layout = _layout(assignment)
    at: dict[tuple[int, int], tuple[str, _Value]] = {}
    for line in live_range.partition("(peak):\n")[2].splitlines():
        live = _LIVE.match(line)
        if live is None:
            break
        value = layout.get(live[1] + live[2])
        if value is None:
            continue
        place, old = places.get(live[1], ""), at.get(value.where)
        if old is None or len(place) > len(places.get(old[0], "")):
            at[value.where] = (live[1], value)
    found: dict[tuple[str, str], Buffer] = {}
    for name, value in at.values():
        place = places.get(name) or re.sub(r"[.\d]+$", "", name)
        so_far = found.get((place, value.shape), Buffer(place, value.shape, 0, 0))
        found[place, value.shape] = Buffer(place, value.shape, so_far.count + 1, so_far.bytes + value.bytes)
    return sorted(found.values(), key=lambda buffer: -buffer.bytes)


def _places(program: str) -> dict[str, str]:
    """The place of each instruction in the traced program, as far as XLA knows it."""
    matches = (_OP_NAME.match(line) for line in program.splitlines())
    return {match[1]: place_of(match[2]) for match in matches if match}


class _Value(NamedTuple):
    """A value in XLA's layout of memory; `where` is (allocation, offset)."""

    where: tuple[int, int]
    bytes: int
    shape: str


def _layout(assignment: str) -> dict[str, _Value]:
    """Values of the device's main memory by name and index, `while.49{2}`."""
    found = {}
    number, main = -1, False
    for line in assignment.splitlines():
        if head := _ALLOCATION.match(line):
            number, main = int(head[1]), head[2] is None
        elif main and (value := _VALUE.match(line)):
            found[value[1] + (value[2] or "{}")] = _Value((number, int(value[4])), int(value[3]), value[5])
    return found


def place_of(op_name: str) -> str:
    """A readable form of JAX's name of a place: `state['params']['head']['kernel']` as `params/head/kernel`, and
    `jit(train)/jvp()/while/body/dot_general` as `forward/while/body/dot_general`."""
    op_name = op_name.replace("\\'", "'")
    if keys := _ARGUMENT.findall(op_name):
        moments = re.search(r"\]\.(\w+)\[", op_name)
        return "/".join([*keys[:1], *([moments[1]] if moments else []), *keys[1:]])
    parts = [part for part in op_name.split("/") if not part.startswith("jit(")]
    named = {"jvp()": "forward", "transpose(jvp())": "backward"}
    return "/".join(named.get(part, part) for part in parts if part != "closed_call")
