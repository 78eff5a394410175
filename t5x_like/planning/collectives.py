"""What a compiled program sends between devices, by mesh axis: read from XLA's text, loops multiplied out."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from t5x_like.planning.hlo import Instruction, Module

Groups = list[tuple[int, ...]]
"""Devices that talk with each other, by their places in the mesh's flat order."""

_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH_IOTA = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\(([^{]*)\))? ?\{([^}]*)\}")
_CHAIN = re.compile(r'channel_id=(\d+).*frontend_attributes=\{[^}]*chain_id="')
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="([A-Z_]+)"')
_MESH_AXIS = re.compile(r"'([^']+)'(?:=(\d+)|:\((\d+)\)(\d+))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of a step of one kind over the same axes.

    Attributes:
      kind: XLA's name; an all-reduce of which each device keeps its share counts as reduce-scatter.
      axes: Mesh axes that its groups go along; () where all groups are single devices.
      slices: Slices that a group of it spans: above 1 it goes over the data center's network.
      count: How many run in a step.
      bytes: Data in a step: of the whole array that a group gathers, scatters or sums, or that a device sends on.
      sent: Bytes that a device sends in a step, by the best ring: (n - 1) / n of the array, twice for all-reduce.
      sent_between_slices: Of these, what leaves its slice, as the device's share.
    """

    kind: str
    axes: tuple[str, ...]
    slices: int
    count: int
    bytes: int
    sent: float
    sent_between_slices: float


def collectives(module: Module, mesh: Mapping[str, int], slice_of: Sequence[int] | None = None) -> list[Collective]:
    """The collectives of a step, those that send most first.

    Args:
      module: The compiled program.
      mesh: Axis -> degree, outermost first.
      slice_of: The slice of each device in the mesh's flat order; None: all are in one.
    """
    devices = math.prod(mesh.values())
    slices = np.zeros(devices, int) if slice_of is None else np.asarray(slice_of)
    runs = module.runs()
    found: dict[tuple[str, tuple[str, ...], int], Collective] = {}
    chains = set()
    for name, computation in module.computations.items():
        for instruction in computation.instructions.values() if runs[name] else ():
            kind = instruction.opcode.removesuffix("-start")
            if kind in _KINDS and (chain := _CHAIN.search(instruction.attributes)):
                # XLA:TPU spreads an asynchronous collective over fusions of other work, and writes it in each of them.
                channel = (instruction.opcode, chain[1])
                if channel in chains:
                    continue
                chains.add(channel)
            if kind in _KINDS:
                # XLA:TPU's fusion of an all-reduce and the slice that a device keeps of it.
                kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
                one = _one(kind, instruction, groups_of(instruction, devices), mesh, slices)
            elif kind == "send" and (between := _TRANSFER.search(instruction.attributes)):
                one = _between_slices(between[1].lower().replace("_", "-"), instruction, mesh, slices)
            else:
                continue
            key = (one.kind, one.axes, one.slices)
            total = found.get(key, dataclasses.replace(one, count=0, bytes=0, sent=0.0, sent_between_slices=0.0))
            found[key] = dataclasses.replace(
                total,
                count=total.count + runs[name],
                bytes=total.bytes + runs[name] * one.bytes,
                sent=total.sent + runs[name] * one.sent,
                sent_between_slices=total.sent_between_slices + runs[name] * one.sent_between_slices,
            )
    return sorted(found.values(), key=lambda each: -each.sent)


def _one(
    kind: str, instruction: Instruction, groups: Groups, mesh: Mapping[str, int], slices: npt.NDArray[np.int_]
) -> Collective:
    size = max(map(len, groups))
    per_group = [len(set(slices[list(group)])) for group in groups]
    data = _data(kind, instruction, size)
    if kind in ("collective-permute", "collective-broadcast"):
        sent = float(data)
        crossing = float(np.mean([count > 1 for count in per_group]))
    else:
        sent = data * (size - 1) / size * (2 if kind == "all-reduce" else 1)
        # In a hierarchy of rings a device sends its slice's share of the array over the network, to the other slices.
        spanned = max(per_group)
        within = size // spanned
        crossing = ((spanned - 1) / spanned / within) / ((size - 1) / size) if size > 1 else 0.0
    return Collective(kind, axes_of(groups, mesh), max(per_group), 1, data, sent, sent * crossing)


def _between_slices(
    kind: str, instruction: Instruction, mesh: Mapping[str, int], slices: npt.NDArray[np.int_]
) -> Collective:
    """What XLA:TPU hands to the network between slices: each device its share of an array, reduced within the slice."""
    count = len(set(slices.tolist()))
    by_axis = slices.reshape(tuple(mesh.values()))
    crossing = [axis for place, axis in enumerate(mesh) if np.ptp(by_axis, axis=place).any()]
    data = instruction.arrays[0].bytes
    sent = data * (count - 1) / count * (2 if kind == "all-reduce" else 1)
    return Collective(kind, tuple(crossing), count, 1, data, sent, sent)


def _data(kind: str, instruction: Instruction, size: int) -> int:
    """Bytes of the array that the devices of a group make or share out together."""
    arrays = instruction.arrays
    if instruction.opcode == "collective-permute-start":
        arrays = arrays[: len(arrays) // 2 or 1][:1]
    elif instruction.opcode == "all-gather-start":
        arrays = arrays[len(arrays) // 2 :]
    total = sum(array.bytes for array in arrays)
    # What a device keeps of a reduce-scatter is its share of the array.
    return total * size if kind == "reduce-scatter" and instruction.opcode.startswith("reduce-scatter") else total


def axes_of(groups: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    places = np.stack(np.unravel_index(np.arange(math.prod(mesh.values())), tuple(mesh.values())), axis=1)
    differ = np.zeros(len(mesh), bool)
    for group in groups:
        own = places[list(group)]
        differ |= (own != own[0]).any(axis=0)
    return tuple(axis for axis, differs in zip(mesh, differ, strict=True) if differs)


def groups_of(instruction: Instruction, devices: int) -> Groups:
    """Who talks with whom: of a permutation the pairs of source and target.

    Four forms: lists, `{{0,1},{2,3}}`; a transposed count, `[2,4]<=[4,2]T(1,0)`; axes of a mesh that XLA made for
    itself, `mesh['axis_0'=2,'axis_1'=4] {'axis_1'}`, also of a share of an axis, `'axis_1':(2)2`; and none or an empty
    list, which is everyone.

    Raises:
      ValueError: another form.
    """
    text = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        return _lists(pairs[1])
    if by_mesh := _MESH.search(text):
        return _mesh_groups(by_mesh[1], by_mesh[2], by_mesh[3])
    if iota := _IOTA.search(text):
        return [tuple(row) for row in _iota(iota[2], iota[3]).reshape(_sizes(iota[1])).tolist()]
    if lists := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return _lists(lists[1])
    if "replica_groups=" not in text or "replica_groups={}" in text:
        return [tuple(range(devices))]
    start = text.index("replica_groups=")
    raise ValueError(f"groups of devices in a form that is not known: {text[start : start + 120]}")


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


def _lists(text: str) -> Groups:
    return [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", text)]


def _iota(counted: str, order: str | None) -> npt.NDArray[np.int_]:
    """The device numbers in the order of a transposed count, flat."""
    numbers = np.arange(math.prod(_sizes(counted))).reshape(_sizes(counted))
    return (numbers.transpose(_sizes(order)) if order else numbers).reshape(-1)


def _mesh_groups(axes: str, device_ids: str | None, along: str) -> Groups:
    sizes = {name: int(size) for name, size, _, _ in _MESH_AXIS.findall(axes)}
    numbers = np.arange(math.prod(sizes.values()))
    if device_ids:
        iota = _MESH_IOTA.match(device_ids)
        numbers = _iota(iota[1], iota[2]) if iota else np.array([int(n) for n in re.findall(r"\d+", device_ids)])
    # Each axis becomes (before, share, after), so that a share of an axis is an axis of its own.
    shape: list[int] = []
    chosen: list[int] = []
    wanted = {name: (int(before or 1), int(size or sizes[name])) for name, _, before, size in _MESH_AXIS.findall(along)}
    for name, size in sizes.items():
        before, share = wanted.get(name, (1, 1))
        chosen += [len(shape) + 1] if name in wanted else []
        shape += [before, share, size // (before * share)]
    rest = [axis for axis in range(len(shape)) if axis not in chosen]
    grouped = numbers.reshape(shape).transpose(rest + chosen)
    return [tuple(row) for row in grouped.reshape(-1, math.prod(shape[axis] for axis in chosen)).tolist()]
