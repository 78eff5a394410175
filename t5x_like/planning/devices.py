"""Devices that need not exist: enough of one for a mesh, shardings and an abstract trace. Compiling needs more."""

from __future__ import annotations

import dataclasses

from t5x_like.planning.topologies import Topology


@dataclasses.dataclass(frozen=True)
class DescribedDevice:
    """What `jax.sharding.Mesh` and the placement of a mesh along a machine's links ask of a device.

    Attributes:
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


def described_devices(topology: Topology) -> list[DescribedDevice]:
    """The devices of a topology in JAX's order, slice by slice, the first coordinate changing fastest. Hosts are equal
    runs of them, which is so for the counts; which chips share a host on a torus is left to real topologies."""
    accelerator = topology.accelerator
    is_tpu = accelerator.platform == "tpu"
    x_size, y_size, z_size = (*topology.shape, 1, 1)[:3]
    found: list[DescribedDevice] = []
    for slice_index in range(topology.num_slices):
        for z in range(z_size):
            for y in range(y_size):
                for x in range(x_size):
                    for core in range(accelerator.devices_per_chip):
                        found.append(
                            DescribedDevice(
                                id=len(found),
                                platform=accelerator.platform,
                                device_kind=topology.device_kind,
                                process_index=len(found) // topology.devices_per_host,
                                slice_index=slice_index if is_tpu else None,
                                coords=(x, y, z) if is_tpu else None,
                                core_on_chip=core,
                            )
                        )
    return found
