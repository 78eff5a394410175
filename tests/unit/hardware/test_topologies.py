"""Table of accelerators, and the forms in which a topology is written."""

from __future__ import annotations

import math

import pytest

from t5x_like.errors import ConfigError
from t5x_like.hardware.topologies import ACCELERATORS, accelerator_of, parse_topology


@pytest.mark.parametrize(
    ("text", "name", "chips", "devices", "hosts"),
    [
        ("v5e:16x16", "v5e:16x16", 256, 256, 64),
        ("v5e-256", "v5e:16x16", 256, 256, 64),
        ("v5litepod-16", "v5e:4x4", 16, 16, 4),
        ("v6e:4x2", "v6e:2x4", 8, 8, 1),
        ("v4:2x2x1", "v4:2x2x1", 4, 4, 1),
        # 128 TensorCores, two per chip.
        ("v5p-128", "v5p:4x4x4", 64, 64, 16),
        ("V5P:4x8x4", "v5p:4x4x8", 128, 128, 32),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 4, 8, 1),
        ("h100:8", "h100:8", 8, 8, 1),
        ("a100-40gb:16", "a100-40gb:16", 16, 16, 2),
        ("cpu:8", "cpu:8", 8, 8, 1),
    ],
)
def test_forms_are_parsed(text: str, name: str, chips: int, devices: int, hosts: int) -> None:
    topology = parse_topology(text)
    assert (topology.name, topology.num_chips, topology.num_devices, topology.num_hosts) == (
        name,
        chips,
        devices,
        hosts,
    )
    assert parse_topology(topology.name) == topology
    if topology.accelerator_type is not None and topology.accelerator.name != "tpu7x":
        assert parse_topology(topology.accelerator_type) == topology


def test_slices_multiply_totals_but_not_per_device_numbers() -> None:
    one, two = parse_topology("v5e:4x8"), parse_topology("v5e:4x8", num_slices=2)
    for name in ("num_chips", "num_devices", "num_hosts", "flops_per_second"):
        assert getattr(two, name) == 2 * getattr(one, name)
    assert (two.hbm_bytes, two.devices_per_host) == (one.hbm_bytes, one.devices_per_host)
    assert parse_topology(str(two)) == two


@pytest.mark.parametrize(
    ("text", "slices", "message"),
    [
        ("v7x:2x2x1", 1, "did you mean tpu7x"),
        ("h10:8", 1, "did you mean h100"),
        ("v5e", 1, "KIND:SHAPE such as v5e:16x16"),
        ("v5e:16x17", 1, "v5e:16x16"),
        ("v5e-7", 1, "one of 1, 4, 8"),
        ("v5p:3x4x4", 1, "a multiple of 4"),
        ("v5p:16x16", 1, "three sizes"),
        ("v4:32x32x32", 1, "at most 4096 in a slice; use several slices"),
        ("h100:2x2", 1, "h100:COUNT"),
        ("h100:12", 1, "a multiple of 8"),
        ("h100:8", 2, "only TPUs have slices"),
        ("v5e:2x2", 0, "1 or more"),
        ("v5p-0", 1, "TensorCores that makes a slice"),
        ("2 x v5e:2x2", 3, "the number of slices only once"),
        ("cpu:100000000", 1, "chips in total"),
        ("v5p-999999936", 1, "chips in total"),
        ("", 1, "found nothing, expected KIND:SHAPE"),
    ],
)
def test_invalid_topologies_are_refused_with_valid_ones(text: str, slices: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_topology(text, num_slices=slices)


@pytest.mark.parametrize(
    ("kind", "name", "teraflops"),
    [
        ("TPU v4", "v4", 275),
        ("TPU v5 lite", "v5e", 197),
        ("TPU v5", "v5p", 459),
        ("TPU v5p", "v5p", 459),
        ("TPU v6 lite", "v6e", 918),
        ("TPU7x", "tpu7x", 2307),
        ("NVIDIA A100-SXM4-80GB", "a100", 312),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb", 312),
        ("NVIDIA H100 80GB HBM3", "h100", 989),
        ("NVIDIA H100 PCIe", "h100-pcie", 756),
        ("NVIDIA H200", "h200", 989),
    ],
)
def test_device_kinds_are_recognized(kind: str, name: str, teraflops: float) -> None:
    found = accelerator_of(kind)
    assert found is not None
    assert (found.name, found.flops_per_second) == (name, teraflops * 1e12)


def test_a_cpu_is_not_in_the_table() -> None:
    assert accelerator_of("cpu") is None


@pytest.mark.parametrize("accelerator", ACCELERATORS, ids=lambda accelerator: accelerator.name)
def test_each_accelerator_is_found_by_its_device_kinds_and_has_plausible_numbers(accelerator) -> None:
    for kind in accelerator.device_kinds:
        assert accelerator_of(kind) is accelerator
    assert 0 < accelerator.usable_bytes <= accelerator.hbm_bytes
    # Nearer memory is faster, and a chip computes far more than it reads.
    assert accelerator.network_bytes_per_second < accelerator.link_bytes_per_second < accelerator.hbm_bytes_per_second
    assert 50 < accelerator.flops_per_second / accelerator.hbm_bytes_per_second < 600
    if accelerator.platform == "tpu":
        shape = "16x16" if accelerator.axes == 2 else "4x4x4"
        assert parse_topology(f"{accelerator.name}:{shape}").num_chips == math.prod(map(int, shape.split("x")))
