"""Outlines of devices that need not exist: enough of one for a mesh, shardings and an abstract trace, and no more, so
that a plan needs nothing but jax. To compile for a machine, `planning.compiler` asks XLA's own description of it."""

from __future__ import annotations

import dataclasses
import itertools

from t5x_like.planning.topologies import Topology


@dataclasses.dataclass(frozen=True)
class DeviceOutline:
    """What `jax.sharding.Mesh` and the placement of a mesh along a machine's links ask of a device.

    Attributes:
      slice_index: None where there are no slices.
      coords: Of its chip in the slice's torus; None where there is none.
    """

    id: int
    platform: str
    device_kind: str
    process_index: int
    slice_index: int | None
    coords: tuple[int, int, int] | None
    core_on_chip: int

    def __str__(self) -> str:
        return f"{self.device_kind} {self.id}"


def device_outlines(topology: Topology) -> list[DeviceOutline]:
    """The devices of a topology in JAX's order: slice by slice, the first coordinate changing fastest. Hosts are equal
    runs of them: right in number, while which chips of a torus share a host is left to real devices."""
    accelerator = topology.accelerator
    is_tpu = accelerator.platform == "tpu"
    x_size, y_size, z_size = (*topology.shape, 1, 1)[:3]
    places = itertools.product(
        range(topology.num_slices),
        range(z_size),
        range(y_size),
        range(x_size),
        range(accelerator.devices_per_chip),
    )
    return [
        DeviceOutline(
            id=number,
            platform=accelerator.platform,
            device_kind=topology.device_kind,
            process_index=number // topology.devices_per_host,
            slice_index=slice_index if is_tpu else None,
            coords=(x, y, z) if is_tpu else None,
            core_on_chip=core,
        )
        for number, (slice_index, z, y, x, core) in enumerate(places)
    ]
