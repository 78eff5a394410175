"""The device mesh: axes data, fsdp, expert, context, tensor, outermost first, within slices and between them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from t5x_like.config import ConfigError, PartitioningConfig, Problem
from t5x_like.config.sections import degrees_problems


class Degrees(NamedTuple):
    """The degree of each mesh axis within a slice (ICI) and between slices (DCN)."""

    ici: dict[str, int]
    dcn: dict[str, int]

    @property
    def mesh(self) -> dict[str, int]:
        """The size of each axis."""
        return {axis: degree * self.dcn[axis] for axis, degree in self.ici.items()}


def resolve_degrees(config: PartitioningConfig, num_devices: int, num_slices: int = 1) -> Degrees:
    """The degrees with -1 filled in.

    Args:
      config: The degrees.
      num_devices: Of all slices together.
      num_slices: Slices of equal size.

    Raises:
      ConfigError: a degree that is neither positive nor -1, more than one -1, or a product that is not the number of
        slices or of the devices in a slice.
    """
    problems = [
        *degrees_problems("partitioning", config.degrees, "devices"),
        *degrees_problems("partitioning.dcn", config.dcn.degrees, "slices"),
    ]
    if num_devices % num_slices:
        found = f"{num_devices} devices in {num_slices} slices"
        problems.append(Problem("partitioning.dcn", found, "slices with as many devices each"))
    if problems:
        raise ConfigError(problems)
    within = "the number of devices" if num_slices == 1 else f"the number of devices in each of {num_slices} slices"
    ici, ici_problems = _filled("partitioning", config.degrees, num_devices // num_slices, within)
    dcn, dcn_problems = _filled("partitioning.dcn", config.dcn.degrees, num_slices, "the number of slices")
    if ici_problems or dcn_problems:
        raise ConfigError(ici_problems + dcn_problems)
    return Degrees(ici, dcn)


def _filled(where: str, degrees: Mapping[str, int], count: int, meaning: str) -> tuple[dict[str, int], list[Problem]]:
    """Degrees whose product is `count`, or what is wrong."""
    free = [axis for axis, degree in degrees.items() if degree == -1]
    product = math.prod(degree for degree in degrees.values() if degree != -1)
    if free and count % product == 0:
        return {**degrees, free[0]: count // product}, []
    if product == count and not free:
        return dict(degrees), []
    stated = " x ".join(f"{axis}={degree}" for axis, degree in degrees.items())
    expected = f"degrees whose product {'divides' if free else 'is'} {meaning}, {count}"
    fix = "" if free else "let one axis be -1, which takes what is left"
    return {}, [Problem(where, f"{stated} (product {product})", expected, fix)]


def known_slices(devices: Sequence[Any]) -> int | None:
    """How many slices the devices are in; None where they do not say (simulated devices)."""
    found = {getattr(device, "slice_index", None) for device in devices}
    return None if None in found else len(found)


def make_mesh(config: PartitioningConfig, devices: Sequence[Any]) -> Mesh:
    """The mesh of `config` over exactly these devices, placed along the machine's links where their kind is known.

    Devices that do not know their slice are one, unless the degrees between slices are named: then as many equal
    groups, in order, stand for slices; where there is one for each process, they are the processes.

    Args:
      config: The degrees; -1 takes what is left.
      devices: Real devices, or the described ones of a topology to compile for.

    Raises:
      ConfigError: the degrees do not multiply to the number of devices and of slices.
    """
    known = known_slices(devices)
    named = math.prod(degree for degree in config.dcn.degrees.values() if degree > 0)
    num_slices = named if known is None else known
    degrees = resolve_degrees(config, len(devices), num_slices)
    ici, dcn = tuple(degrees.ici.values()), tuple(degrees.dcn.values())
    if num_slices == 1:
        grid = mesh_utils.create_device_mesh(ici, devices, allow_split_physical_axes=True)
    elif known is not None or _one_process_each(devices, num_slices):
        _check_equal(devices, "slice_index" if known is not None else "process_index")
        grid = mesh_utils.create_hybrid_device_mesh(
            ici, dcn, devices, process_is_granule=known is None, allow_split_physical_axes=True
        )
    else:
        grid = _grouped(ici, dcn, devices)
    return Mesh(grid, tuple(degrees.ici), axis_types=(AxisType.Auto,) * len(ici))


def _one_process_each(devices: Sequence[Any], num_slices: int) -> bool:
    return len({device.process_index for device in devices}) == num_slices


def _check_equal(devices: Sequence[Any], attribute: str) -> None:
    sizes = Counter(getattr(device, attribute) for device in devices)
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{count} in {attribute} {index}" for index, count in sorted(sizes.items()))
        raise ConfigError([Problem("partitioning.dcn", f"devices: {found}", "slices with as many devices each")])


def _grouped(ici: tuple[int, ...], dcn: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Equal groups of devices, in order, in the place of slices."""
    grid = np.empty(len(devices), object)
    grid[:] = list(devices)
    # [dcn axes, ici axes], then each axis's two degrees beside each other.
    ranks = len(ici)
    pairs = [axis for pair in zip(range(ranks), range(ranks, 2 * ranks), strict=True) for axis in pair]
    return grid.reshape(dcn + ici).transpose(pairs).reshape(tuple(a * b for a, b in zip(dcn, ici, strict=True)))
