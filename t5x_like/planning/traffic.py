"""Bytes that a compiled program moves between memory and cores of a device, by XLA's text, loops multiplied out.

Each instruction reads its operands and writes its result once; what a fusion keeps inside costs nothing, nor do arrays
in faster memories. Of an operand that is only sliced, the slices count, and of an array that is updated in place the
update. XLA's own count (`cost_analysis`) is of this kind but takes the body of a loop once.
"""

from __future__ import annotations

from t5x_like.planning.hlo import Computation, Instruction, Module

_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id "
    "opt-barrier iota send-done recv recv-done copy-done async-start async-update async-done add-dependency "
    "all-gather-done all-reduce-done collective-permute-done domain".split()
)
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
_SAME = frozenset(("bitcast", "copy", "reshape", "convert", "transpose", "get-tuple-element", "pad"))


def memory_traffic(module: Module) -> int:
    """Bytes of a step on one device."""
    runs = module.runs()
    inner = _called_by_fusions(module)
    return sum(
        runs[name] * _instruction_bytes(instruction, computation, module)
        for name, computation in module.computations.items()
        if runs[name] and name not in inner
        for instruction in computation.instructions.values()
    )


def _called_by_fusions(module: Module) -> set[str]:
    """Computations whose arrays never reach the memory: of fusions, reductions, sorts."""
    found = set()
    todo = [
        name
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode not in ("while", "conditional", "call", "async-start")
        for _, name in instruction.called
    ]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += [
                callee
                for instruction in module.computations[name].instructions.values()
                for _, callee in instruction.called
            ]
    return found


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
    # Of an array that is updated in place, the update is written and not the array.
    return total + max(_in_memory(fusion) - _kept(body, module), 0)


def _parameters(body: Computation) -> list[Instruction | None]:
    found: dict[int, Instruction] = {}
    for instruction in body.instructions.values():
        if instruction.opcode == "parameter":
            found[int(instruction.literal)] = instruction
    return [found.get(number) for number in range(max(found, default=-1) + 1)]


def _kept(body: Computation, module: Module) -> int:
    """Bytes that updates in place leave as they are."""
    total = 0
    for instruction in body.instructions.values():
        if instruction.opcode == "dynamic-update-slice":
            total += instruction.bytes - body.instructions[instruction.operands[1]].bytes
        elif instruction.opcode == "fusion":
            total += _kept(module.computations[instruction.called[0][1]], module)
    return total


def _sliced(name: str, body: Computation, module: Module) -> int | None:
    """Bytes that are read of an array of which only slices or updates are made; None where it is read whole."""
    total = 0
    for reader in body.instructions.values():
        for place, operand in enumerate(reader.operands):
            if operand != name:
                continue
            of_reader = _sliced_by(reader, place, body, module)
            if of_reader is None:
                return None
            total += of_reader
    return total


def _sliced_by(reader: Instruction, place: int, body: Computation, module: Module) -> int | None:
    if reader.opcode in _SLICES and place == 0:
        return reader.bytes
    if reader.opcode == "dynamic-update-slice" and place == 0:
        return 0
    if reader.opcode in _SAME and not reader.is_root:
        return _sliced(reader.name, body, module)
    if reader.opcode == "fusion":
        inner = module.computations[reader.called[0][1]]
        parameter = _parameters(inner)[place]
        return None if parameter is None else _sliced(parameter.name, inner, module)
    return None
