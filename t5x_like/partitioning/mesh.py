"""The device mesh: axes data, fsdp, expert, context, tensor, outermost first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from t5x_like.config import ConfigError, PartitioningConfig, Problem


def resolve_degrees(config: PartitioningConfig, num_devices: int) -> dict[str, int]:
    """The degree of each mesh axis, -1 filled in.

    Raises:
      ConfigError: a degree that is neither positive nor -1, more than one -1, or a product that is not `num_devices`.
    """
    degrees = config.degrees
    stated = " x ".join(f"{axis}={degree}" for axis, degree in degrees.items())
    problems = [
        Problem(f"partitioning.{axis}", str(degree), "a positive degree, or -1 for what is left")
        for axis, degree in degrees.items()
        if degree < 1 and degree != -1
    ]
    free = [axis for axis, degree in degrees.items() if degree == -1]
    if len(free) > 1:
        problems.append(Problem("partitioning", f"-1 for {' and '.join(free)}", "at most one degree of -1"))
    if problems:
        raise ConfigError(problems)
    product = math.prod(degree for degree in degrees.values() if degree != -1)
    if free and num_devices % product == 0:
        return {**degrees, free[0]: num_devices // product}
    if product != num_devices or free:
        expected = f"degrees whose product {'divides' if free else 'is'} the number of devices, {num_devices}"
        fix = "" if free else "let one axis be -1, which takes what is left"
        raise ConfigError([Problem("partitioning", f"{stated} (product {product})", expected, fix)])
    return degrees


def make_mesh(config: PartitioningConfig, devices: Sequence[Any]) -> Mesh:
    """The mesh of `config` over exactly these devices, placed along the machine's links where their kind is known.

    Args:
      config: The degrees; -1 takes what is left.
      devices: Real devices, or the described ones of a topology to compile for.

    Raises:
      ConfigError: the degrees do not multiply to the number of devices.
    """
    degrees = resolve_degrees(config, len(devices))
    grid = mesh_utils.create_device_mesh(tuple(degrees.values()), devices, allow_split_physical_axes=True)
    return Mesh(grid, tuple(degrees), axis_types=(AxisType.Auto,) * len(degrees))
