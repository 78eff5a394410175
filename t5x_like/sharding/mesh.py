"""Device mesh with the axes data, fsdp, expert, context and tensor, outermost first, within slices and between them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from t5x_like.config import ShardingConfig
from t5x_like.config.validation.sections import degrees_problems
from t5x_like.errors import ConfigError, ConfigProblem


class Degrees(NamedTuple):
    """Degree of each mesh axis within a slice (ICI) and between slices (DCN)."""

    ici: dict[str, int]
    dcn: dict[str, int]

    @property
    def mesh(self) -> dict[str, int]:
        """Size of each mesh axis: the product of both degrees."""
        return {axis: degree * self.dcn[axis] for axis, degree in self.ici.items()}


def resolve_degrees(config: ShardingConfig, num_devices: int, num_slices: int = 1) -> Degrees:
    """Return the degrees with -1 filled in.

    Args:
      config: The degrees.
      num_devices: Number of devices over all slices.
      num_slices: Number of slices, which are of equal size.

    Raises:
      ConfigError: A degree is neither positive nor -1, more than one is -1, or the product is not the number of slices
        or of the devices in a slice.
    """
    problems = [
        *degrees_problems("sharding", config.degrees, "devices"),
        *degrees_problems("sharding.dcn", config.dcn.degrees, "slices"),
    ]
    if num_devices % num_slices:
        found = f"{num_devices} devices in {num_slices} slices"
        problems.append(ConfigProblem("sharding.dcn", found, "slices of equal size"))
    if problems:
        raise ConfigError(problems)
    within = "the number of devices" if num_slices == 1 else f"the number of devices in each of {num_slices} slices"
    ici, ici_problems = _fill("sharding", config.degrees, num_devices // num_slices, within)
    dcn, dcn_problems = _fill("sharding.dcn", config.dcn.degrees, num_slices, "the number of slices")
    if ici_problems or dcn_problems:
        raise ConfigError(ici_problems + dcn_problems)
    return Degrees(ici, dcn)


def _fill(
    where: str, degrees: Mapping[str, int], count: int, meaning: str
) -> tuple[dict[str, int], list[ConfigProblem]]:
    """Return degrees whose product is `count`, or the problems."""
    free = [axis for axis, degree in degrees.items() if degree == -1]
    product = math.prod(degree for degree in degrees.values() if degree != -1)
    if free and count % product == 0:
        return {**degrees, free[0]: count // product}, []
    if product == count and not free:
        return dict(degrees), []
    stated = " x ".join(f"{axis}={degree}" for axis, degree in degrees.items())
    expected = f"degrees whose product {'divides' if free else 'is'} {meaning}, {count}"
    fix = "" if free else "set one axis to -1, which takes the remaining devices"
    return {}, [ConfigProblem(where, f"{stated} (product {product})", expected, fix)]


def known_slices(devices: Sequence[Any]) -> int | None:
    """Return the number of slices of the devices; None if they do not know their slice (simulated devices)."""
    indices = {getattr(device, "slice_index", None) for device in devices}
    return None if None in indices else len(indices)


def make_mesh(config: ShardingConfig, devices: Sequence[Any]) -> Mesh:
    """Return the mesh of `config` over exactly these devices, laid out along the physical links if their kind is known.

    Devices that do not know their slice form one slice, unless degrees between slices are given. Then equal groups of
    consecutive devices stand for slices; if there is one group per process, the groups are the processes.

    Args:
      config: The degrees; -1 takes the remaining devices.
      devices: Real devices, or the described ones of a topology to compile for.

    Raises:
      ConfigError: The degrees do not multiply to the number of devices and of slices.
    """
    known = known_slices(devices)
    given = math.prod(degree for degree in config.dcn.degrees.values() if degree > 0)
    # Devices that know their slices decide the number of slices, otherwise the given degrees do.
    num_slices = given if known is None else known
    degrees = resolve_degrees(config, len(devices), num_slices)
    ici, dcn = tuple(degrees.ici.values()), tuple(degrees.dcn.values())
    if num_slices == 1:
        # Along the physical links, so that neighbours on a mesh axis are neighbours on the torus. Splitting physical
        # axes is allowed: otherwise many degrees have no layout.
        grid = mesh_utils.create_device_mesh(ici, devices, allow_split_physical_axes=True)
    elif known is not None or _one_process_each(devices, num_slices):
        _require_equal(devices, "slice_index" if known is not None else "process_index")
        grid = mesh_utils.create_hybrid_device_mesh(
            ici, dcn, devices, process_is_granule=known is None, allow_split_physical_axes=True
        )
    else:
        # Simulated devices have neither slice nor links; consecutive groups stand for slices, so that such a mesh can
        # be tested.
        grid = _group_devices(ici, dcn, devices)
    # jax 0.10 defaults to explicit axes; `constrain` and the shardings of this package are written for automatic ones.
    return Mesh(grid, tuple(degrees.ici), axis_types=(AxisType.Auto,) * len(ici))


def _one_process_each(devices: Sequence[Any], num_slices: int) -> bool:
    return len({device.process_index for device in devices}) == num_slices


def _require_equal(devices: Sequence[Any], attribute: str) -> None:
    sizes = Counter(getattr(device, attribute) for device in devices)
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{count} in {attribute} {index}" for index, count in sorted(sizes.items()))
        raise ConfigError([ConfigProblem("sharding.dcn", f"devices: {found}", "slices of equal size")])


def _group_devices(ici: tuple[int, ...], dcn: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Return the device grid for equal groups of consecutive devices that stand for slices."""
    grid = np.empty(len(devices), object)
    grid[:] = list(devices)
    # Shape [dcn axes, ici axes]; the transpose puts the two degrees of each axis beside each other, DCN outermost.
    ranks = len(ici)
    pairs = [axis for pair in zip(range(ranks), range(ranks, 2 * ranks), strict=True) for axis in pair]
    return grid.reshape(dcn + ici).transpose(pairs).reshape(tuple(a * b for a, b in zip(dcn, ici, strict=True)))
