"""Parser of XLA's text of a compiled program: its instructions, and how often each of them runs.

The parser needs neither jax nor a device. It reads the form that `compiled.as_text()` has; see `compiler_formats` for
the version. Bytes count the elements of the arrays; the padding of tiles is not counted.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

from t5x_like.planning.xla import compiler_formats

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Array:
    """Array as one device holds it.

    Attributes:
      space: XLA's number of the memory space of the array; 0 is the main memory of the device.
    """

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> int:
        bits = _BITS.get(self.dtype)
        if bits is None:
            # The first number in the name is the width: f8e4m3fn has 8 bits, s32 has 32.
            bits = int(re.search(r"\d+", self.dtype)[0])  # type: ignore[index]
        return -(-math.prod(self.shape) * bits // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      arrays: Results; several for a tuple, whose nesting is not kept.
      operands: Names of instructions of the same computation.
      literal: Text between the parentheses, as in `constant(16)`.
      attributes: Text after the parentheses.
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
        """Name of the operation in the traced program, `jit(train)/jvp()/while/body/dot_general`; "" if XLA made it."""
        match = compiler_formats.OP_NAME.search(self.attributes)
        return match[1] if match else ""

    @property
    def called(self) -> list[tuple[str, str]]:
        """(role, computation) of each called computation, as in ("body", "region_1.2")."""
        calls = []
        for role, names in compiler_formats.CALLED.findall(self.attributes):
            calls += [(role, name.strip().lstrip("%")) for name in names.strip("{}").split(",") if name.strip()]
        return calls


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: Mapping[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(instruction for instruction in self.instructions.values() if instruction.is_root)


@dataclasses.dataclass(frozen=True)
class Module:
    """Compiled program.

    Attributes:
      computations: Name -> computation, callees before their callers.
      entry: Name of the computation that is run.
    """

    computations: Mapping[str, Computation]
    entry: str

    def execution_counts(self) -> dict[str, int]:
        """Return how often each computation runs in a step.

        The body of a loop runs as often as its condition allows, both branches of a conditional once each. A loop
        whose trip count is not in the text counts as one iteration.

        Raises:
          ValueError: The text has not all computations that are called.
        """
        count = dict.fromkeys(self.computations, 0)
        count[self.entry] = 1
        for name in reversed(list(self.computations)):
            for instruction in self.computations[name].instructions.values() if count[name] else ():
                trips = (self.trip_count(instruction) or 1) if instruction.opcode == "while" else 1
                for role, callee in instruction.called:
                    if callee not in count:
                        raise ValueError(f"found no computation {callee} in the text, which {instruction.name} calls")
                    count[callee] += {"body": trips, "condition": trips + 1}.get(role, 1) * count[name]
        return count

    def trip_count(self, loop: Instruction) -> int | None:
        """Return the number of iterations of a `while` instruction.

        It is the number that XLA states, or the constant that the loop's condition compares its counter with, which
        starts at 0; None if neither is in the text.
        """
        if known := compiler_formats.TRIP_COUNT.search(loop.attributes):
            return int(known[1])
        todo = [name for role, name in loop.called if role == "condition"]
        constants, comparisons = [], 0
        while todo:
            computation = self.computations[todo.pop()]
            for instruction in computation.instructions.values():
                todo += [callee for _, callee in instruction.called]
                comparisons += instruction.opcode == "compare"
                if instruction.opcode == "constant" and compiler_formats.LOOP_COUNTER.match(str(instruction.arrays[0])):
                    constants.append(int(instruction.literal))
        return constants[0] if len(constants) == 1 and comparisons == 1 else None


def parse(text: str) -> Module:
    """Parse the text of a program.

    Raises:
      ValueError: The text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    instructions: dict[str, Instruction] = {}
    name, entry = "", ""
    for line in whole_lines(text):
        if head := compiler_formats.COMPUTATION.match(line):
            name, instructions = head[2], {}
            entry = name if head[1] else entry
        elif name and compiler_formats.COMPUTATION_END.match(line):
            computations[name] = Computation(name, instructions)
            name = ""
        elif name and (instruction := _instruction(line)):
            instructions[instruction.name] = instruction
    if not entry:
        raise ValueError("found no ENTRY computation in the text of the program")
    return Module(computations, entry)


def whole_lines(text: str) -> Iterator[str]:
    """Yield the lines of a text, those of an instruction as one: attributes of kernels (Pallas) have line breaks."""
    instruction = ""
    for line in text.splitlines():
        begins = compiler_formats.INSTRUCTION_NAME.match(line)
        if instruction and not begins and not compiler_formats.COMPUTATION_END.match(line):
            instruction += line
            continue
        if instruction:
            yield instruction
        instruction = line if begins else ""
        if not begins:
            yield line


def arrays(text: str) -> Iterator[Array]:
    """Yield the arrays of a shape, as in `(f32[8,128]{1,0:T(8,128)}, s32[])`."""
    for dtype, sizes, layout in compiler_formats.ARRAY.findall(text):
        space = compiler_formats.MEMORY_SPACE.search(layout)
        # A bounded dynamic size is written <=n.
        shape = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        yield Array(dtype, shape, int(space[1]) if space else 0)


def _instruction(line: str) -> Instruction | None:
    head = compiler_formats.INSTRUCTION_NAME.match(line)
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
        operands=tuple(compiler_formats.OPERAND.findall(inside)),
        literal=inside,
        attributes=line[closing + 1 :],
        is_root=head[1] is not None,
    )


def _closing(text: str, opening: int) -> int:
    """Return the index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise ValueError(f"found an unclosed parenthesis in {text[:200]}")
