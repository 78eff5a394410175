"""Names that cloud providers use for the accelerators of `hardware.topologies`."""

from __future__ import annotations

import dataclasses

from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.hardware.topologies import Topology, parse_topology


@dataclasses.dataclass(frozen=True)
class CloudNames:
    """Names of one accelerator.

    Attributes:
      gke: Value of GKE's accelerator label on its nodes.
      skypilot: SkyPilot's name of a GPU; None for a TPU, which is named by its accelerator type.
      runtime_version: Software version of a TPU VM; None if there are no TPU VMs of the kind.
    """

    gke: str
    skypilot: str | None = None
    runtime_version: str | None = None


# TPUs: Google Cloud's pages on TPU software versions and on TPUs in GKE. GPUs: the labels of GKE's GPU node pools.
_NAMES = {
    "v4": CloudNames("tpu-v4-podslice", runtime_version="tpu-ubuntu2204-base"),
    "v5e": CloudNames("tpu-v5-lite-podslice", runtime_version="v2-alpha-tpuv5-lite"),
    "v5p": CloudNames("tpu-v5p-slice", runtime_version="v2-alpha-tpuv5"),
    "v6e": CloudNames("tpu-v6e-slice", runtime_version="v2-alpha-tpuv6e"),
    "tpu7x": CloudNames("tpu7x"),
    "h200": CloudNames("nvidia-h200-141gb", "H200"),
    "h100": CloudNames("nvidia-h100-80gb", "H100"),
    "a100": CloudNames("nvidia-a100-80gb", "A100-80GB"),
    "a100-40gb": CloudNames("nvidia-tesla-a100", "A100"),
}


def cloud_names(topology: Topology) -> CloudNames:
    """Return the names of the topology's accelerator.

    Raises:
      ConfigError: No cloud is known to offer the accelerator.
    """
    names = _NAMES.get(topology.accelerator.name)
    if names is None:
        expected = f"one of {', '.join(_NAMES)}"
        raise ConfigError([ConfigProblem("--topology", topology.accelerator.name, expected)])
    return names


def chips_per_host(topology: Topology) -> int:
    """Return the number of chips of each host of a slice."""
    return topology.chips_per_slice // topology.hosts_per_slice


def expectations(topology: Topology) -> tuple[str, ...]:
    """Return flags with which `train` starts only on the whole topology, with one process per host."""
    return ("--expect-processes", str(topology.num_hosts), "--expect-devices", str(topology.num_devices))


def shape_text(topology: Topology) -> str:
    """Return the shape of a slice as `16x16`."""
    return "x".join(map(str, topology.shape))


def accelerator_type(topology: Topology) -> str:
    """Return Google Cloud's name of one slice, which gives the number of chips but not their shape.

    Raises:
      ConfigError: The topology has no TPUs, or its shape is not the one that the name stands for.
    """
    name = topology.accelerator_type
    if name is None:
        raise ConfigError([ConfigProblem("--topology", str(topology), "a TPU topology such as v5e:16x16")])
    standard = parse_topology(name)
    if standard.shape != topology.shape:
        fix = "the target gke accepts any shape"
        raise ConfigError(
            [ConfigProblem("--topology", str(topology), f"{standard.name}, which is the shape of {name}", fix)]
        )
    return name
