"""The machines that a run can be planned for: accelerators, their numbers, and how many of them hang together.

This is the one table of accelerators: plans, the choice of a mesh, launchers and the utilisation that training reports
all read it. It knows neither jax nor a device.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from typing import Literal

from t5x_like.config.errors import ConfigError, Problem

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One kind of chip or card. All numbers are of one chip by its maker; a chip can be several devices to JAX.

    Attributes:
      name: As in a topology, `v5e`.
      device_kinds: What `jax.Device.device_kind` contains, the first being the usual one.
      hbm_bytes: High bandwidth memory.
      usable_bytes: What of it a program can have.
      flops_per_second: Dense bfloat16 matrix products.
      hbm_bytes_per_second: Memory to chip.
      link_bytes_per_second: What the chip can send to its neighbours at once, over all links: ICI of a TPU, NVLink of
        a GPU. One direction.
      network_bytes_per_second: The chip's share of its host's network (DCN). One direction.
      axes: Dimensions of the torus that a slice is; 0 where there is none.
      chips_per_host: Of a slice that spans hosts.
      single_host_chips: The most chips of one host, in slices that need no other.
      pod_chips: The most chips of a slice; None without a limit of the kind.
      cores_per_chip: TensorCores, which some names of slices count.
      accelerator_type: Google Cloud's name for it, before the dash.
    """

    name: str
    platform: Literal["tpu", "gpu", "cpu"]
    device_kinds: tuple[str, ...]
    hbm_bytes: int
    usable_bytes: int
    flops_per_second: float
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    network_bytes_per_second: float
    axes: int = 0
    chips_per_host: int = 8
    single_host_chips: int = 8
    pod_chips: int | None = None
    cores_per_chip: int = 1
    devices_per_chip: int = 1
    accelerator_type: str | None = None


def _tpu(name: str, kinds: tuple[str, ...], hbm: float, usable: float, **numbers: float | int | str) -> Accelerator:
    return Accelerator(name, "tpu", kinds, int(hbm * GIB), int(usable * GIB), **numbers)  # type: ignore[arg-type]


def _gpu(name: str, kinds: tuple[str, ...], gib: float, tflops: float, tb_per_s: float, link: float) -> Accelerator:
    # Of a GPU's memory JAX takes three quarters, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise (JAX's page on
    # GPU memory). The network is that of a DGX: an adapter per GPU, 400 Gbit/s with H100 and H200, 200 with A100.
    network = 25e9 if name.startswith("a100") else 50e9
    memory = int(gib * GIB)
    return Accelerator(name, "gpu", kinds, memory, memory * 3 // 4, tflops * 1e12, tb_per_s * 1e12, link * 1e9, network)


# TPUs: FLOP/s, memory, bandwidths and hosts are those of Google Cloud's page on each (cloud.google.com/tpu/docs/v4,
# v5e, v5p, v6e, tpu7x; for v5p and v6e also the comparison on the page of tpu7x). ICI is stated there for both
# directions (400, 1200, 800, 1200 GB/s) or in Gbit/s for one (1600, 4800, 3200); here for one. v4: six links of 50 GB/s
# (Jouppi et al. 2023, arXiv 2304.01433). DCN: 6.4 Tbit/s per pod of 256 for v5e, 50 or 100 Gbit/s per chip for v5p,
# v6e, tpu7x; for v4 6.25 GB/s (Austin et al. 2025, How to Scale Your Model). What is usable is XLA:TPU's own limit, as
# its out-of-memory error states it (libtpu 0.0.42.1); per chip, so twice that of a device of tpu7x. Of v5p that is more
# than the 95 GB of its page, which are rounded down from 96.
# GPUs: NVIDIA's data sheets, without sparsity, NVLink halved to one direction.
# The first whose name a device's kind contains counts, so longer names come first.
ACCELERATORS: tuple[Accelerator, ...] = (
    _tpu(
        "v6e",
        ("TPU v6 lite", "TPU v6e"),
        32,
        31.25,
        flops_per_second=918e12,
        hbm_bytes_per_second=1638e9,
        link_bytes_per_second=400e9,
        network_bytes_per_second=12.5e9,
        axes=2,
        chips_per_host=4,
        pod_chips=256,
        accelerator_type="v6e",
    ),
    _tpu(
        "v5e",
        ("TPU v5 lite", "TPU v5e"),
        16,
        15.75,
        flops_per_second=197e12,
        hbm_bytes_per_second=819e9,
        link_bytes_per_second=200e9,
        network_bytes_per_second=3.125e9,
        axes=2,
        chips_per_host=4,
        pod_chips=256,
        accelerator_type="v5litepod",
    ),
    _tpu(
        "v5p",
        ("TPU v5", "TPU v5p"),
        96,
        95.74,
        flops_per_second=459e12,
        hbm_bytes_per_second=2765e9,
        link_bytes_per_second=600e9,
        network_bytes_per_second=6.25e9,
        axes=3,
        chips_per_host=4,
        single_host_chips=4,
        pod_chips=8960,
        cores_per_chip=2,
        accelerator_type="v5p",
    ),
    _tpu(
        "v4",
        ("TPU v4",),
        32,
        30.75,
        flops_per_second=275e12,
        hbm_bytes_per_second=1200e9,
        link_bytes_per_second=300e9,
        network_bytes_per_second=6.25e9,
        axes=3,
        chips_per_host=4,
        single_host_chips=4,
        pod_chips=4096,
        cores_per_chip=2,
        accelerator_type="v4",
    ),
    # A chip of two devices, each with half of everything.
    _tpu(
        "tpu7x",
        ("TPU7x", "TPU 7x"),
        192,
        189.5,
        flops_per_second=2307e12,
        hbm_bytes_per_second=7380e9,
        link_bytes_per_second=600e9,
        network_bytes_per_second=12.5e9,
        axes=3,
        chips_per_host=4,
        single_host_chips=4,
        pod_chips=9216,
        cores_per_chip=2,
        devices_per_chip=2,
        accelerator_type="tpu7x",
    ),
    _gpu("h200-nvl", ("H200 NVL",), 141, 835, 4.8, 450),
    _gpu("h200", ("H200",), 141, 989, 4.8, 450),
    _gpu("h100-nvl", ("H100 NVL",), 94, 835, 3.9, 300),
    _gpu("h100-pcie", ("H100 PCIe",), 80, 756, 2.0, 300),
    _gpu("h100", ("H100",), 80, 989, 3.35, 450),
    _gpu("a100-40gb", ("A100-SXM4-40GB", "A100-PCIE-40GB"), 40, 312, 1.555, 300),
    _gpu("a100", ("A100",), 80, 312, 2.039, 300),
)
CPU = Accelerator("cpu", "cpu", ("cpu",), 0, 0, 0.0, 0.0, 0.0, 0.0, chips_per_host=1, single_host_chips=1)
"""Simulated devices: of their memory and speed nothing is known beforehand."""

_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
"""Shapes of a slice of less than a cube of 4 x 4 x 4."""
_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_MOST_CHIPS = 2**20
"""Over all slices: more than any machine has, and few enough to be counted out one by one."""
_FORMS = "KIND:SHAPE such as v5e:16x16 or v5p:4x4x8, KIND-COUNT such as v5e-256, or KIND:COUNT such as h100:8 or cpu:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of one kind, joined by the data center's network; within a slice by links.

    Attributes:
      accelerator: The kind.
      shape: Chips along each dimension of a slice's torus; of GPUs and CPUs (n,).
      num_slices: For GPUs 1: their hosts count by themselves.
    """

    accelerator: Accelerator
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def name(self) -> str:
        """Of one slice, as `parse_topology` reads it: `v5e:16x16`."""
        return f"{self.accelerator.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips_per_slice(self) -> int:
        return math.prod(self.shape)

    @property
    def num_chips(self) -> int:
        return self.chips_per_slice * self.num_slices

    @property
    def num_devices(self) -> int:
        """What JAX will count, over all slices."""
        return self.num_chips * self.accelerator.devices_per_chip

    @property
    def hosts_per_slice(self) -> int:
        if self.accelerator.platform == "cpu" or self.chips_per_slice <= self.accelerator.single_host_chips:
            return 1
        return -(-self.chips_per_slice // self.accelerator.chips_per_host)

    @property
    def num_hosts(self) -> int:
        return self.hosts_per_slice * self.num_slices

    @property
    def devices_per_host(self) -> int:
        return self.num_devices // self.num_hosts

    @property
    def device_kind(self) -> str:
        """What JAX will call a device."""
        return self.accelerator.device_kinds[0]

    @property
    def accelerator_type(self) -> str | None:
        """Google Cloud's name of a slice, `v5litepod-256`, which counts TensorCores of v4 and v5p; None for others."""
        if self.accelerator.accelerator_type is None:
            return None
        cores = 1 if self.accelerator.axes == 2 else self.accelerator.cores_per_chip
        return f"{self.accelerator.accelerator_type}-{self.chips_per_slice * cores}"

    @property
    def hbm_bytes(self) -> int:
        """Of a device; 0 where it is not known."""
        return self.accelerator.hbm_bytes // self.accelerator.devices_per_chip

    @property
    def usable_bytes(self) -> int:
        """What a program can have of a device's memory; 0 where it is not known."""
        return self.accelerator.usable_bytes // self.accelerator.devices_per_chip

    @property
    def flops_per_second(self) -> float:
        """Of all devices together."""
        return self.accelerator.flops_per_second * self.num_chips

    def __str__(self) -> str:
        return self.name if self.num_slices == 1 else f"{self.num_slices} x {self.name}"


def accelerator_of(device_kind: str) -> Accelerator | None:
    """The accelerator that JAX calls by this `device_kind`; None for one that is not in the table, and for a CPU."""
    for accelerator in ACCELERATORS:
        if any(kind in device_kind for kind in accelerator.device_kinds):
            return accelerator
    return None


def parse_topology(text: str, num_slices: int = 1) -> Topology:
    """Reads `v5e:16x16`, `v5e-256`, `v5p:4x4x8`, `v5p-128` (which counts TensorCores, as Google Cloud does: 64 chips),
    `h100:8`, `cpu:8`, and what `str` of a topology writes: `2 x v5e:16x16`.

    Raises:
      ConfigError: no such kind, a shape that a slice of the kind cannot have, or several slices of what has none.
    """
    text = text.strip().lower()
    if several := re.fullmatch(r"(\d{1,9}) ?x ?([a-z].*)", text):
        if num_slices not in (1, int(several[1])):
            raise _wrong(f"{text}, and {num_slices} slices beside it", "the number of slices once")
        num_slices, text = int(several[1]), several[2]
    match = re.fullmatch(r"(?P<kind>[a-z0-9-]*?[a-z0-9])(?P<mark>[:-])(?P<size>\d{1,9}(x\d{1,9})*)", text)
    if match is None:
        raise _wrong(text or "nothing", _FORMS)
    accelerator = _of_name(match["kind"], text)
    sizes = tuple(map(int, match["size"].split("x")))
    if math.prod(sizes) * num_slices > _MOST_CHIPS:
        raise _wrong(f"{num_slices} x {text}", f"{_MOST_CHIPS:,} chips at most in all")
    if accelerator.platform != "tpu":
        if num_slices != 1:
            raise _wrong(f"{num_slices} slices of {text}", "one: slices are of TPUs", "give the number of all devices")
        if len(sizes) != 1 or sizes[0] < 1:
            raise _wrong(text, f"{accelerator.name}:COUNT, as in {accelerator.name}:8")
        if sizes[0] > accelerator.single_host_chips > 1 and sizes[0] % accelerator.chips_per_host:
            raise _wrong(text, f"whole hosts of {accelerator.chips_per_host}, or fewer in one host")
        return Topology(accelerator, sizes)
    if num_slices < 1:
        raise _wrong(f"{num_slices} slices", "1 or more")
    shape = _shape_of_count(accelerator, sizes[0], text) if len(sizes) == 1 else sizes
    return Topology(accelerator, _checked_shape(accelerator, shape, text), num_slices)


def _wrong(found: str, expected: str, fix: str = "") -> ConfigError:
    return ConfigError([Problem("topology", found, expected, fix)])


def _of_name(name: str, text: str) -> Accelerator:
    known = {accelerator.name: accelerator for accelerator in (*ACCELERATORS, CPU)} | {
        accelerator.accelerator_type: accelerator for accelerator in ACCELERATORS if accelerator.accelerator_type
    }
    if name in known:
        return known[name]
    misnamed = {"v7x": "tpu7x", "v7": "tpu7x", "v5": "v5p", "v6": "v6e", "v5lite": "v5e", "a100-80gb": "a100"}
    near = [misnamed[name]] if name in misnamed else difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"perhaps you meant {near[0]}" if near else _FORMS
    raise _wrong(text, f"a kind of {', '.join(sorted({a.name for a in known.values()}))}", hint)


def _shape_of_count(accelerator: Accelerator, count: int, text: str) -> tuple[int, ...]:
    """The usual shape of a slice that is given by its number: of chips, or of TensorCores for those named by them."""
    if accelerator.axes == 2:
        if count in _FLAT:
            return _FLAT[count]
        counts = ", ".join(map(str, _FLAT))
        raise _wrong(text, f"one of {counts} chips of {accelerator.name}")
    chips, rest = divmod(count, accelerator.cores_per_chip)
    small = {math.prod(shape): shape for shape in _SMALL}
    if not rest and chips in small:
        return small[chips]
    if not rest and chips and chips % 64 == 0:
        return _nearest_cube(chips // 64)
    raise _wrong(text, f"TensorCores of whole slices, {accelerator.cores_per_chip} to a chip", _FORMS)


def _nearest_cube(cubes: int) -> tuple[int, int, int]:
    """The box of so many cubes of 4 x 4 x 4 with the least surface."""
    boxes = [
        (a, b, cubes // (a * b))
        for a in range(1, cubes + 1)
        if cubes % a == 0
        for b in range(a, cubes // a + 1)
        if (cubes // a) % b == 0 and cubes // (a * b) >= b
    ]
    a, b, c = min(boxes, key=lambda box: box[0] * box[1] + box[1] * box[2] + box[0] * box[2])
    return 4 * a, 4 * b, 4 * c


def _checked_shape(accelerator: Accelerator, shape: tuple[int, ...], text: str) -> tuple[int, ...]:
    """The shape in the order that its maker writes it."""
    name = accelerator.name
    if accelerator.axes == 2:
        found = tuple(sorted(shape))
        if found not in _FLAT.values():
            raise _wrong(text, "one of " + ", ".join(f"{name}:{a}x{b}" for a, b in _FLAT.values()))
        return found
    for small in _SMALL:
        if sorted(shape) == sorted(small):
            return small
    if len(shape) != 3 or any(size == 0 or size % 4 for size in shape):
        fix = f"as in {', '.join(name + ':' + 'x'.join(map(str, small)) for small in _SMALL)}, {name}:4x4x8"
        raise _wrong(text, "three sizes, each a multiple of 4, or a smaller slice", fix)
    if accelerator.pod_chips is not None and math.prod(shape) > accelerator.pod_chips:
        found_chips = f"{text}, {math.prod(shape)} chips"
        raise _wrong(found_chips, f"{accelerator.pod_chips} at most in a slice", "use several slices (--num-slices)")
    return tuple(sorted(shape))
