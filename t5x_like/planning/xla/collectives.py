"""Collectives of a compiled program by mesh axis: read from XLA's text, with loops multiplied out."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from t5x_like.planning.xla import compiler_formats
from t5x_like.planning.xla.hlo_text import Instruction, Module

Groups = list[tuple[int, ...]]
"""Groups of devices that communicate, by their index in the flattened mesh."""

_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of a step of one kind over the same axes.

    Attributes:
      kind: XLA's name; an all-reduce of which each device keeps its shard counts as reduce-scatter.
      axes: Mesh axes along which the groups extend; () if all groups are single devices.
      slices: Number of slices that a group spans: above 1 the collective uses the data center's network.
      count: Number of executions in a step.
      bytes: Bytes in a step of the whole array that a group gathers, scatters or sums, or that a device sends on.
      sent: Bytes that a device sends in a step, by the optimal ring: (n - 1) / n of the array, twice that for
        all-reduce.
      sent_between_slices: Part of `sent` that leaves the device's slice, as the share of this device.
    """

    kind: str
    axes: tuple[str, ...]
    slices: int
    count: int
    bytes: int
    sent: float
    sent_between_slices: float


def collectives(module: Module, mesh: Mapping[str, int], slice_of: Sequence[int] | None = None) -> list[Collective]:
    """Return the collectives of a step, those that send most first.

    Args:
      module: The compiled program.
      mesh: Axis -> degree, outermost first.
      slice_of: The slice of each device in the order of the flattened mesh; None if all are in one slice.
    """
    devices = math.prod(mesh.values())
    slices = np.zeros(devices, int) if slice_of is None else np.asarray(slice_of)
    counts = module.execution_counts()
    totals: dict[tuple[str, tuple[str, ...], int], Collective] = {}
    chains = set()
    for name, computation in module.computations.items():
        for instruction in computation.instructions.values() if counts[name] else ():
            kind = instruction.opcode.removesuffix("-start")
            if kind in _KINDS and (chain := compiler_formats.ASYNC_CHAIN.search(instruction.attributes)):
                # XLA:TPU spreads an asynchronous collective over several fusions and repeats it in each of them.
                channel = (instruction.opcode, chain[1])
                if channel in chains:
                    continue
                chains.add(channel)
            if kind in _KINDS:
                # XLA:TPU fuses an all-reduce with the slice that a device keeps of it.
                kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
                one = _collective(kind, instruction, groups_of(instruction, devices), mesh, slices)
            elif kind == "send" and (transfer := compiler_formats.SLICE_TRANSFER.search(instruction.attributes)):
                one = _slice_transfer(transfer[1].lower().replace("_", "-"), instruction, mesh, slices)
            else:
                continue
            key = (one.kind, one.axes, one.slices)
            total = totals.get(key, dataclasses.replace(one, count=0, bytes=0, sent=0.0, sent_between_slices=0.0))
            totals[key] = dataclasses.replace(
                total,
                count=total.count + counts[name],
                bytes=total.bytes + counts[name] * one.bytes,
                sent=total.sent + counts[name] * one.sent,
                sent_between_slices=total.sent_between_slices + counts[name] * one.sent_between_slices,
            )
    return sorted(totals.values(), key=lambda total: -total.sent)


def _collective(
    kind: str, instruction: Instruction, groups: Groups, mesh: Mapping[str, int], slices: npt.NDArray[np.int_]
) -> Collective:
    size = max(map(len, groups))
    slices_per_group = [len(set(slices[list(group)])) for group in groups]
    data = _data(kind, instruction, size)
    if kind in ("collective-permute", "collective-broadcast"):
        sent = float(data)
        crossing = float(np.mean([count > 1 for count in slices_per_group]))
    else:
        sent = data * (size - 1) / size * (2 if kind == "all-reduce" else 1)
        # In a hierarchy of rings, a device sends its slice's share of the array over the network to the other slices.
        spanned = max(slices_per_group)
        within = size // spanned
        crossing = ((spanned - 1) / spanned / within) / ((size - 1) / size) if size > 1 else 0.0
    return Collective(kind, axes_of(groups, mesh), max(slices_per_group), 1, data, sent, sent * crossing)


def _slice_transfer(
    kind: str, instruction: Instruction, mesh: Mapping[str, int], slices: npt.NDArray[np.int_]
) -> Collective:
    """Return a transfer over the network between slices: each device sends its shard, reduced within the slice."""
    count = len(set(slices.tolist()))
    by_axis = slices.reshape(tuple(mesh.values()))
    # The axes along which the slice number changes.
    crossing = [axis for dimension, axis in enumerate(mesh) if np.ptp(by_axis, axis=dimension).any()]
    data = instruction.arrays[0].bytes
    sent = data * (count - 1) / count * (2 if kind == "all-reduce" else 1)
    return Collective(kind, tuple(crossing), count, 1, data, sent, sent)


def _data(kind: str, instruction: Instruction, size: int) -> int:
    """Return the bytes of the array that the devices of a group compute or share together."""
    arrays = instruction.arrays
    # Asynchronous instructions have a tuple of operands and results (and, of a permutation, of its synchronization).
    if instruction.opcode == "collective-permute-start":
        arrays = arrays[: len(arrays) // 2 or 1][:1]
    elif instruction.opcode == "all-gather-start":
        arrays = arrays[len(arrays) // 2 :]
    total = sum(array.bytes for array in arrays)
    # The result of a reduce-scatter on a device is its shard of the array.
    return total * size if kind == "reduce-scatter" and instruction.opcode.startswith("reduce-scatter") else total


def axes_of(groups: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Return the mesh axes along which the devices of a group differ."""
    coordinates = np.stack(np.unravel_index(np.arange(math.prod(mesh.values())), tuple(mesh.values())), axis=1)
    differ = np.zeros(len(mesh), bool)
    for group in groups:
        members = coordinates[list(group)]
        differ |= (members != members[0]).any(axis=0)
    return tuple(axis for axis, differs in zip(mesh, differ, strict=True) if differs)


def groups_of(instruction: Instruction, devices: int) -> Groups:
    """Return the groups of devices that communicate; for a permutation, the pairs of source and target.

    XLA writes them in four forms: lists, `{{0,1},{2,3}}`; a transposed iota, `[2,4]<=[4,2]T(1,0)`; axes of a mesh that
    XLA defines, `mesh['axis_0'=2,'axis_1'=4] {'axis_1'}`, also with a part of an axis, `'axis_1':(2)2`; and no list or
    an empty one, which stands for all devices.

    Raises:
      ValueError: The groups have another form.
    """
    text = instruction.attributes
    if pairs := compiler_formats.SOURCE_TARGET_PAIRS.search(text):
        return _lists(pairs[1])
    if by_mesh := compiler_formats.GROUP_MESH.search(text):
        return _mesh_groups(by_mesh[1], by_mesh[2], by_mesh[3])
    if iota := compiler_formats.GROUP_IOTA.search(text):
        return [tuple(row) for row in _iota(iota[2], iota[3]).reshape(_sizes(iota[1])).tolist()]
    if lists := compiler_formats.GROUP_LISTS.search(text):
        return _lists(lists[1])
    if "replica_groups=" not in text or "replica_groups={}" in text:
        return [tuple(range(devices))]
    start = text.index("replica_groups=")
    raise ValueError(
        f"found groups of devices in an unknown form, expected those of libtpu {compiler_formats.LIBTPU_VERSION}: "
        f"{text[start : start + 120]}"
    )


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


def _lists(text: str) -> Groups:
    return [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", text)]


def _iota(shape: str, order: str | None) -> npt.NDArray[np.int_]:
    """Return the device indices of a transposed iota, flattened."""
    indices = np.arange(math.prod(_sizes(shape))).reshape(_sizes(shape))
    return (indices.transpose(_sizes(order)) if order else indices).reshape(-1)


def _mesh_groups(axes: str, device_ids: str | None, along: str) -> Groups:
    """Return the groups along some axes, or parts of axes, of a mesh that XLA defines."""
    sizes = {name: int(size) for name, size, _, _ in compiler_formats.MESH_AXIS.findall(axes)}
    indices = np.arange(math.prod(sizes.values()))
    if device_ids:
        iota = compiler_formats.MESH_IOTA.match(device_ids)
        indices = _iota(iota[1], iota[2]) if iota else np.array([int(n) for n in re.findall(r"\d+", device_ids)])
    # Each axis is reshaped to (before, part, after), so that a part of an axis is an axis of its own.
    shape: list[int] = []
    group_axes: list[int] = []
    parts = {
        name: (int(before or 1), int(size or sizes[name]))
        for name, _, before, size in compiler_formats.MESH_AXIS.findall(along)
    }
    for name, size in sizes.items():
        before, part = parts.get(name, (1, 1))
        group_axes += [len(shape) + 1] if name in parts else []
        shape += [before, part, size // (before * part)]
    # With the axes of a group last, each row of the flattened rest is a group.
    other_axes = [axis for axis in range(len(shape)) if axis not in group_axes]
    grouped = indices.reshape(shape).transpose(other_axes + group_axes)
    return [tuple(row) for row in grouped.reshape(-1, math.prod(shape[axis] for axis in group_axes)).tolist()]
