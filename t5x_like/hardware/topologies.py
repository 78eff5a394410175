"""Accelerators and topologies: the specifications of each kind of chip, and the shapes of its slices.

This is the only table of accelerators: plans, the choice of a mesh, launchers and the utilization that training reports
all read it. It needs neither jax nor a device.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from typing import Literal

from t5x_like.errors import ConfigError, ConfigProblem

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """Kind of chip or card. All numbers are the maker's for one chip; JAX may see a chip as several devices.

    Attributes:
      name: Name in a topology, such as `v5e`.
      platform: JAX platform.
      device_kinds: Texts that `jax.Device.device_kind` may contain, the usual one first.
      hbm_bytes: High bandwidth memory in bytes.
      usable_bytes: Bytes of that memory that a program can use.
      flops_per_second: Peak FLOP/s of dense bfloat16 matrix products.
      hbm_bytes_per_second: Bandwidth between memory and chip.
      link_bytes_per_second: Bandwidth from the chip to its neighbors, over all links and in one direction: ICI of a
        TPU, NVLink of a GPU.
      network_bytes_per_second: Share of the chip in its host's network bandwidth (DCN), in one direction.
      axes: Number of dimensions of a slice's torus; 0 without a torus.
      chips_per_host: Chips per host in a slice that spans several hosts.
      single_host_chips: Maximum number of chips in a slice on one host.
      pod_chips: Maximum number of chips in a slice; None without a limit.
      cores_per_chip: TensorCores per chip, which some slice names count.
      devices_per_chip: JAX devices per chip.
      accelerator_type: Google Cloud's name, without the dash and the size.
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
    # JAX allocates three quarters of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION is set (JAX's page on GPU
    # memory). The network is that of a DGX: one adapter per GPU, 400 Gbit/s with H100 and H200, 200 with A100.
    network = 25e9 if name.startswith("a100") else 50e9
    memory = int(gib * GIB)
    return Accelerator(name, "gpu", kinds, memory, memory * 3 // 4, tflops * 1e12, tb_per_s * 1e12, link * 1e9, network)


# TPUs: FLOP/s, memory, bandwidths and hosts are from Google Cloud's page on each (cloud.google.com/tpu/docs/v4,
# v5e, v5p, v6e, tpu7x; for v5p and v6e also the comparison on the page of tpu7x). That page gives ICI bandwidth for
# both directions (400, 1200, 800, 1200 GB/s) or in Gbit/s for one (1600, 4800, 3200); the table has one direction. v4:
# six links of 50 GB/s (Jouppi et al. 2023, arXiv 2304.01433). DCN: 6.4 Tbit/s per pod of 256 for v5e, 50 or 100 Gbit/s
# per chip for v5p, v6e, tpu7x; for v4 6.25 GB/s (Austin et al. 2025, How to Scale Your Model). The usable memory is
# XLA:TPU's own limit, as its out-of-memory error states it (libtpu 0.0.42.1); per chip, hence twice that of a device of
# tpu7x. For v5p it exceeds the 95 GB of its page, which are rounded down from 96. GPUs: NVIDIA's data sheets, without
# sparsity, NVLink halved to one direction. The first entry with a text that the device kind contains is used, so longer
# texts come first.
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
    # A chip consists of two devices, each with half of everything.
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
"""Simulated devices, whose memory and speed are unknown."""

_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
"""Shapes of slices smaller than a cube of 4 x 4 x 4."""
_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_MAX_CHIPS = 2**20
"""Maximum number of chips over all slices: more than any machine has, and few enough to enumerate."""
_FORMS = "KIND:SHAPE such as v5e:16x16 or v5p:4x4x8, KIND-COUNT such as v5e-256, or KIND:COUNT such as h100:8 or cpu:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of one kind. Links connect the chips of a slice, the data center's network connects the slices.

    Attributes:
      accelerator: Kind of the chips.
      shape: Chips along each dimension of a slice's torus; (n,) for GPUs and CPUs.
      num_slices: Number of slices; 1 for GPUs, which are counted over all hosts.
    """

    accelerator: Accelerator
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def name(self) -> str:
        """Name of one slice, as `parse_topology` reads it: `v5e:16x16`."""
        return f"{self.accelerator.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips_per_slice(self) -> int:
        return math.prod(self.shape)

    @property
    def num_chips(self) -> int:
        return self.chips_per_slice * self.num_slices

    @property
    def num_devices(self) -> int:
        """Number of JAX devices over all slices."""
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
        """JAX's name of a device."""
        return self.accelerator.device_kinds[0]

    @property
    def accelerator_type(self) -> str | None:
        """Google Cloud's name of a slice, `v5litepod-256`, which counts TensorCores for v4 and v5p; None for others."""
        if self.accelerator.accelerator_type is None:
            return None
        cores = 1 if self.accelerator.axes == 2 else self.accelerator.cores_per_chip
        return f"{self.accelerator.accelerator_type}-{self.chips_per_slice * cores}"

    @property
    def hbm_bytes(self) -> int:
        """Memory of a device; 0 if unknown."""
        return self.accelerator.hbm_bytes // self.accelerator.devices_per_chip

    @property
    def usable_bytes(self) -> int:
        """Memory of a device that a program can use; 0 if unknown."""
        return self.accelerator.usable_bytes // self.accelerator.devices_per_chip

    @property
    def flops_per_second(self) -> float:
        """Peak of all devices together."""
        return self.accelerator.flops_per_second * self.num_chips

    def __str__(self) -> str:
        return self.name if self.num_slices == 1 else f"{self.num_slices} x {self.name}"


def accelerator_of(device_kind: str) -> Accelerator | None:
    """Return the accelerator with this `device_kind` in JAX; None if it is not in the table, and for a CPU."""
    for accelerator in ACCELERATORS:
        if any(kind in device_kind for kind in accelerator.device_kinds):
            return accelerator
    return None


def parse_topology(text: str, num_slices: int = 1) -> Topology:
    """Parse a topology.

    The forms are `v5e:16x16`, `v5e-256`, `v5p:4x4x8`, `v5p-128` (which counts TensorCores, as Google Cloud does: 64
    chips), `h100:8`, `cpu:8`, and the `str` of a topology, `2 x v5e:16x16`.

    Raises:
      ConfigError: The kind is unknown, its slices cannot have this shape, or the kind has no slices but several are
        given.
    """
    text = text.strip().lower()
    if several := re.fullmatch(r"(\d{1,9}) ?x ?([a-z].*)", text):
        if num_slices not in (1, int(several[1])):
            raise _error(f"{text} together with {num_slices} slices", "the number of slices only once")
        num_slices, text = int(several[1]), several[2]
    match = re.fullmatch(r"(?P<kind>[a-z0-9-]*?[a-z0-9])(?P<mark>[:-])(?P<size>\d{1,9}(x\d{1,9})*)", text)
    if match is None:
        raise _error(text or "nothing", _FORMS)
    accelerator = _accelerator_by_name(match["kind"], text)
    sizes = tuple(map(int, match["size"].split("x")))
    if math.prod(sizes) * num_slices > _MAX_CHIPS:
        raise _error(f"{num_slices} x {text}", f"at most {_MAX_CHIPS:,} chips in total")
    if accelerator.platform != "tpu":
        if num_slices != 1:
            raise _error(
                f"{num_slices} slices of {text}",
                "one, because only TPUs have slices",
                "give the total number of devices",
            )
        if len(sizes) != 1 or sizes[0] < 1:
            raise _error(text, f"{accelerator.name}:COUNT, such as {accelerator.name}:8")
        if sizes[0] > accelerator.single_host_chips > 1 and sizes[0] % accelerator.chips_per_host:
            raise _error(text, f"a multiple of {accelerator.chips_per_host} (whole hosts), or fewer on one host")
        return Topology(accelerator, sizes)
    if num_slices < 1:
        raise _error(f"{num_slices} slices", "1 or more")
    shape = _shape_of_count(accelerator, sizes[0], text) if len(sizes) == 1 else sizes
    return Topology(accelerator, _checked_shape(accelerator, shape, text), num_slices)


def _error(found: str, expected: str, fix: str = "") -> ConfigError:
    return ConfigError([ConfigProblem("topology", found, expected, fix)])


def _accelerator_by_name(name: str, text: str) -> Accelerator:
    known = {accelerator.name: accelerator for accelerator in (*ACCELERATORS, CPU)} | {
        accelerator.accelerator_type: accelerator for accelerator in ACCELERATORS if accelerator.accelerator_type
    }
    if name in known:
        return known[name]
    misnamed = {"v7x": "tpu7x", "v7": "tpu7x", "v5": "v5p", "v6": "v6e", "v5lite": "v5e", "a100-80gb": "a100"}
    near = [misnamed[name]] if name in misnamed else difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else _FORMS
    raise _error(text, f"a kind of {', '.join(sorted({a.name for a in known.values()}))}", hint)


def _shape_of_count(accelerator: Accelerator, count: int, text: str) -> tuple[int, ...]:
    """Return the standard shape of a slice with a number of chips, or of TensorCores for kinds that count them."""
    if accelerator.axes == 2:
        if count in _FLAT:
            return _FLAT[count]
        counts = ", ".join(map(str, _FLAT))
        raise _error(text, f"one of {counts} chips of {accelerator.name}")
    chips, rest = divmod(count, accelerator.cores_per_chip)
    small = {math.prod(shape): shape for shape in _SMALL}
    if not rest and chips in small:
        return small[chips]
    if not rest and chips and chips % 64 == 0:
        return _nearest_cube(chips // 64)
    raise _error(
        text, f"a number of TensorCores that makes a slice, with {accelerator.cores_per_chip} per chip", _FORMS
    )


def _nearest_cube(cubes: int) -> tuple[int, int, int]:
    """Return the box of `cubes` cubes of 4 x 4 x 4 with the smallest surface."""
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
    """Return the shape with its dimensions in the maker's order."""
    name = accelerator.name
    if accelerator.axes == 2:
        ordered = tuple(sorted(shape))
        if ordered not in _FLAT.values():
            raise _error(text, "one of " + ", ".join(f"{name}:{a}x{b}" for a, b in _FLAT.values()))
        return ordered
    for small in _SMALL:
        if sorted(shape) == sorted(small):
            return small
    if len(shape) != 3 or any(size == 0 or size % 4 for size in shape):
        fix = f"such as {', '.join(name + ':' + 'x'.join(map(str, small)) for small in _SMALL)}, {name}:4x4x8"
        raise _error(text, "three sizes, each a multiple of 4, or one of the smaller slices", fix)
    if accelerator.pod_chips is not None and math.prod(shape) > accelerator.pod_chips:
        found_chips = f"{text}, {math.prod(shape)} chips"
        raise _error(found_chips, f"at most {accelerator.pod_chips} in a slice", "use several slices (--num-slices)")
    return tuple(sorted(shape))
