"""What the clouds call the accelerators of `planning.topologies`, where that is not their name there."""

from __future__ import annotations

import dataclasses

from t5x_like.config import ConfigError, Problem
from t5x_like.planning.topologies import Topology, parse_topology


@dataclasses.dataclass(frozen=True)
class CloudNames:
    """Attributes:
    gke: The value of GKE's accelerator label on its nodes.
    skypilot: Of a card; None for a TPU, which goes by its accelerator type.
    runtime_version: Software of a TPU VM; None where there are no TPU VMs of the kind.
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
    """Raises ConfigError where no cloud is known to rent the accelerator out."""
    found = _NAMES.get(topology.accelerator.name)
    if found is None:
        expected = f"one of {', '.join(_NAMES)}"
        raise ConfigError([Problem("--topology", topology.accelerator.name, expected)])
    return found


def chips_per_host(topology: Topology) -> int:
    return topology.chips_per_slice // topology.hosts_per_slice


def expectations(topology: Topology) -> tuple[str, ...]:
    """Flags of `train` by which it starts on the whole topology only, with a process for each host."""
    return ("--expect-processes", str(topology.num_hosts), "--expect-devices", str(topology.num_devices))


def shape_text(topology: Topology) -> str:
    """`16x16`."""
    return "x".join(map(str, topology.shape))


def accelerator_type(topology: Topology) -> str:
    """Google Cloud's name of one slice, which says how many chips but not in which shape.

    Raises:
      ConfigError: no TPU, or another shape than the one that the name stands for.
    """
    name = topology.accelerator_type
    if name is None:
        raise ConfigError([Problem("--topology", str(topology), "a TPU such as v5e:16x16")])
    usual = parse_topology(name)
    if usual.shape != topology.shape:
        fix = "the target gke takes any shape"
        raise ConfigError([Problem("--topology", str(topology), f"{usual.name}, which is what {name} is", fix)])
    return name
