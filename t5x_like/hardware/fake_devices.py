"""Fake devices of a topology: sufficient for a mesh, shardings and an abstract trace, so that planning needs only jax.

For compilation, `planning.xla.libtpu` takes the devices that XLA itself describes.
"""

from __future__ import annotations

import dataclasses
import itertools

from t5x_like.hardware.topologies import Topology


class FakeMemory(str):
    """Memory that a device reaches: JAX's name of its kind, with which JAX compares it, and for which it asks."""

    __slots__ = ()

    @property
    def kind(self) -> str:
        return str(self)


@dataclasses.dataclass(frozen=True)
class FakeClient:
    """Process of a device's client, which JAX asks for before it asks for memories."""

    process: int

    def process_index(self) -> int:
        return self.process


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """Attributes that `jax.sharding.Mesh`, shardings and the layout of a mesh along physical links read from a device.

    Attributes:
      slice_index: Index of the slice; None without slices.
      coords: Coordinates of the chip in the torus of its slice; None without a torus.
    """

    id: int
    platform: str
    device_kind: str
    process_index: int
    slice_index: int | None
    coords: tuple[int, int, int] | None
    core_on_chip: int

    @property
    def client(self) -> FakeClient:
        """Client whose process is that of the device, which makes each device a local one."""
        return FakeClient(self.process_index)

    def default_memory(self) -> FakeMemory:
        return FakeMemory("device")

    def addressable_memories(self) -> list[FakeMemory]:
        return [FakeMemory("device"), FakeMemory("pinned_host")]

    def __str__(self) -> str:
        return f"{self.device_kind} {self.id}"


def fake_devices(topology: Topology) -> list[FakeDevice]:
    """Return the devices of a topology in JAX's order: slice by slice, with the first coordinate changing fastest.

    Hosts are consecutive groups of equal size. Their number is right; which chips of a torus share a host is known for
    real devices only.
    """
    accelerator = topology.accelerator
    is_tpu = accelerator.platform == "tpu"
    x_size, y_size, z_size = (*topology.shape, 1, 1)[:3]
    positions = itertools.product(
        range(topology.num_slices),
        range(z_size),
        range(y_size),
        range(x_size),
        range(accelerator.devices_per_chip),
    )
    return [
        FakeDevice(
            id=number,
            platform=accelerator.platform,
            device_kind=topology.device_kind,
            process_index=number // topology.devices_per_host,
            slice_index=slice_index if is_tpu else None,
            coords=(x, y, z) if is_tpu else None,
            core_on_chip=core,
        )
        for number, (slice_index, z, y, x, core) in enumerate(positions)
    ]
