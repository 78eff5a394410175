"""XLA's text of a compiled program: its instructions, and how often each of them runs. Knows neither jax nor a device.

What is read here is the form that `compiled.as_text()` of XLA:TPU has (libtpu 0.0.42) and XLA:CPU shares. Bytes are
those of the arrays' elements; what tiles pad is not counted.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,<=]*)\](\{[^{}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{\s*$")
_NAME = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = ")
_CALLED = re.compile(
    r"(calls|body|condition|to_apply|true_computation|false_computation|branch_computations|called_computations)="
    r"(\{[^}]*\}|%?[^\s,})]+)"
)
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_COUNTER = re.compile(r"^[su](8|16|32|64)\[\]")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array as one device holds it.

    Attributes:
      space: XLA's number of the memory it is laid out in; 0 is the device's main memory.
    """

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> int:
        bits = _BITS.get(self.dtype)
        if bits is None:
            # f8e4m3fn is 8 bits wide, s32 32.
            bits = int(re.search(r"\d+", self.dtype)[0])  # type: ignore[index]
        return -(-math.prod(self.shape) * bits // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line.

    Attributes:
      arrays: The results; several for a tuple, whose nesting is not kept.
      operands: Names of instructions of the same computation.
      literal: Between the parentheses, as in `constant(16)`.
      attributes: All that follows.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @property
    def op_name(self) -> str:
        """The place in the traced program, as in `jit(train)/jvp()/while/body/dot_general`; "" if XLA made it up."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> list[tuple[str, str]]:
        """(role, computation) of what it calls, as in ("body", "region_1.2")."""
        found = []
        for role, names in _CALLED.findall(self.attributes):
            found += [(role, name.strip().lstrip("%")) for name in names.strip("{}").split(",") if name.strip()]
        return found


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: Mapping[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(instruction for instruction in self.instructions.values() if instruction.is_root)


@dataclasses.dataclass(frozen=True)
class Module:
    """A program.

    Attributes:
      computations: By name, callees before their callers.
      entry: Name of the one that runs.
    """

    computations: Mapping[str, Computation]
    entry: str

    def runs(self) -> dict[str, int]:
        """How often each computation runs in a step: a loop's body as often as its condition says, both sides of a
        condition once each. A loop whose number of rounds is not in the text counts as one round."""
        count = dict.fromkeys(self.computations, 0)
        count[self.entry] = 1
        for name in reversed(list(self.computations)):
            for instruction in self.computations[name].instructions.values() if count[name] else ():
                rounds = (self.rounds(instruction) or 1) if instruction.opcode == "while" else 1
                for role, callee in instruction.called:
                    times = {"body": rounds, "condition": rounds + 1}.get(role, 1)
                    count[callee] = count.get(callee, 0) + times * count[name]
        return count

    def rounds(self, loop: Instruction) -> int | None:
        """How often a `while` goes round: XLA's own word, or the constant that its condition compares the counter
        with, which starts at 0; None if there is neither."""
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
        todo = [name for role, name in loop.called if role == "condition"]
        constants, comparisons = [], 0
        while todo:
            computation = self.computations[todo.pop()]
            for instruction in computation.instructions.values():
                todo += [callee for _, callee in instruction.called]
                comparisons += instruction.opcode == "compare"
                if instruction.opcode == "constant" and _COUNTER.match(str(instruction.arrays[0])):
                    constants.append(int(instruction.literal))
        return constants[0] if len(constants) == 1 and comparisons == 1 else None


def parse(text: str) -> Module:
    """Reads a program.

    Raises:
      ValueError: there is no entry computation in the text.
    """
    computations: dict[str, Computation] = {}
    instructions: dict[str, Instruction] = {}
    name, entry = "", ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name, instructions = head[2], {}
            entry = name if head[1] else entry
        elif line.startswith("}") and name:
            computations[name] = Computation(name, instructions)
            name = ""
        elif name and (instruction := _instruction(line)):
            instructions[instruction.name] = instruction
    if not entry:
        raise ValueError("no ENTRY in the text of the program")
    return Module(computations, entry)


def arrays(text: str) -> Iterator[Array]:
    """The arrays that a shape names, as in `(f32[8,128]{1,0:T(8,128)}, s32[])`."""
    for dtype, sizes, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        # A bounded dynamic size is written <=n.
        shape = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        yield Array(dtype, shape, int(space[1]) if space else 0)


def _instruction(line: str) -> Instruction | None:
    head = _NAME.match(line)
    if head is None:
        return None
    start = head.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", end)
    closing = _closing(line, opening)
    inside = line[opening + 1 : closing]
    return Instruction(
        name=head[2],
        opcode=line[end:opening].strip(),
        arrays=tuple(arrays(line[start:end])),
        operands=tuple(re.findall(r"%([^\s,(){}]+)", inside)),
        literal=inside,
        attributes=line[closing + 1 :],
        is_root=head[1] is not None,
    )


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis at `opening` is closed."""
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise ValueError(f"an open parenthesis in {text[:200]}")
