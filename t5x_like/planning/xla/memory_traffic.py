"""Bytes that a compiled program moves between memory and cores of a device, by XLA's text, with loops multiplied out.

Each instruction reads its operands and writes its result once. Arrays inside a fusion cost nothing, nor do arrays in
faster memories. Of an operand that is only sliced, the slices count; of an array that is updated in place, the update
counts. XLA's own number (`cost_analysis`) is defined similarly but counts the body of a loop once.
"""

from __future__ import annotations

from t5x_like.planning.xla.hlo_text import Computation, Instruction, Module

_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id "
    "opt-barrier iota send-done recv recv-done copy-done async-start async-update async-done add-dependency "
    "all-gather-done all-reduce-done collective-permute-done domain".split()
)
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
_RELAYOUT = frozenset(("bitcast", "copy", "reshape", "convert", "transpose", "get-tuple-element", "pad"))
"""Operations through which a slice of their result is a slice of their operand."""


def memory_traffic(module: Module) -> int:
    """Return the bytes that a step moves on one device."""
    counts = module.execution_counts()
    inner = _called_by_fusions(module)
    return sum(
        counts[name] * _instruction_bytes(instruction, computation, module)
        for name, computation in module.computations.items()
        if counts[name] and name not in inner
        for instruction in computation.instructions.values()
    )


def _called_by_fusions(module: Module) -> set[str]:
    """Return the computations whose arrays never reach the memory: those of fusions, reductions, sorts."""
    inner = set()
    todo = [
        name
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode not in ("while", "conditional", "call", "async-start")
        for _, name in instruction.called
    ]
    while todo:
        name = todo.pop()
        if name not in inner:
            inner.add(name)
            todo += [
                callee
                for instruction in module.computations[name].instructions.values()
                for _, callee in instruction.called
            ]
    return inner


def _instruction_bytes(instruction: Instruction, computation: Computation, module: Module) -> int:
    if instruction.opcode in _FREE:
        return 0
    operands = [computation.instructions.get(name) for name in instruction.operands]
    if instruction.opcode in _SLICES:
        return 2 * _in_memory(instruction)
    if instruction.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * sum(_in_memory(operand) for operand in operands[1:] if operand is not None)
    if instruction.opcode == "fusion":
        return _fusion_bytes(instruction, operands, module)
    return _in_memory(instruction) + sum(_in_memory(operand) for operand in operands if operand is not None)


def _in_memory(instruction: Instruction) -> int:
    return sum(array.bytes for array in instruction.arrays if array.space == 0)


def _fusion_bytes(fusion: Instruction, operands: list[Instruction | None], module: Module) -> int:
    body = module.computations[fusion.called[0][1]]
    total = 0
    for operand, parameter in zip(operands, _parameters(body), strict=False):
        if operand is not None:
            sliced = _sliced(parameter.name, body, module) if parameter is not None else None
            total += _in_memory(operand) if sliced is None else min(_in_memory(operand), sliced)
    # If an array is updated in place, only the update is written.
    return total + max(_in_memory(fusion) - _unchanged_bytes(body, module), 0)


def _parameters(body: Computation) -> list[Instruction | None]:
    """Return the parameters of a computation by their number."""
    by_number: dict[int, Instruction] = {}
    for instruction in body.instructions.values():
        if instruction.opcode == "parameter":
            by_number[int(instruction.literal)] = instruction
    return [by_number.get(number) for number in range(max(by_number, default=-1) + 1)]


def _unchanged_bytes(body: Computation, module: Module) -> int:
    """Return the bytes that updates in place leave unchanged."""
    total = 0
    for instruction in body.instructions.values():
        if instruction.opcode == "dynamic-update-slice":
            total += instruction.bytes - body.instructions[instruction.operands[1]].bytes
        elif instruction.opcode == "fusion":
            total += _unchanged_bytes(module.computations[instruction.called[0][1]], module)
    return total


def _sliced(name: str, body: Computation, module: Module) -> int | None:
    """Return the bytes read of an array that is only sliced or updated; None if it is read as a whole."""
    total = 0
    for reader in body.instructions.values():
        for position, operand in enumerate(reader.operands):
            if operand != name:
                continue
            read = _sliced_by(reader, position, body, module)
            if read is None:
                return None
            total += read
    return total


def _sliced_by(reader: Instruction, position: int, body: Computation, module: Module) -> int | None:
    """Return the bytes that an instruction reads of its operand at `position`; None if it reads all of it."""
    if reader.opcode in _SLICES and position == 0:
        return reader.bytes
    if reader.opcode == "dynamic-update-slice" and position == 0:
        return 0
    if reader.opcode in _RELAYOUT and not reader.is_root:
        return _sliced(reader.name, body, module)
    if reader.opcode == "fusion":
        inner = module.computations[reader.called[0][1]]
        parameter = _parameters(inner)[position]
        return None if parameter is None else _sliced(parameter.name, inner, module)
    return None
