"""Sharding of a run: degrees of the mesh axes, within a slice and between slices, and sharding rules."""

from __future__ import annotations

from typing import Literal

from t5x_like.config.dataclass import config_dataclass

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""Mesh axes, outermost first."""
ContextAttention = Literal["ring", "all_gather"]


@config_dataclass
class DcnConfig:
    """Degrees of the mesh axes between slices, over the data-center network; their product is the number of slices.

    A slice is a group of devices with fast interconnect: a TPU slice, or the GPUs of one machine. The size of a mesh
    axis is its degree within a slice times its degree here. One degree may be -1: it is inferred from the number of
    slices. By default slices are data parallel, which needs the least communication over the slow network.
    """

    data: int = -1
    """Data parallelism between slices."""
    fsdp: int = 1
    """Fully sharded data parallelism between slices."""
    expert: int = 1
    """Expert parallelism between slices."""
    context: int = 1
    """Context parallelism between slices."""
    tensor: int = 1
    """Tensor parallelism between slices."""

    @property
    def degrees(self) -> dict[str, int]:
        """Degree between slices by mesh axis."""
        return {axis: getattr(self, axis) for axis in AXES}


@config_dataclass
class ShardingConfig:
    """Degrees of the mesh axes within a slice; their product is the number of devices of a slice.

    One degree may be -1: it is inferred from the number of devices. Without slices, all devices form one slice.
    """

    auto: bool = False
    """Choose the degrees for the available devices and print the reason. The degrees must then not be set here."""
    data: int = 1
    """Data parallelism: copies of the model, each with its part of the batch."""
    fsdp: int = -1
    """Fully sharded data parallelism: parts of the batch that also shard the parameters."""
    expert: int = 1
    """Expert parallelism: shards of the experts."""
    context: int = 1
    """Context parallelism: shards of each row's length."""
    tensor: int = 1
    """Tensor parallelism: shards of heads, MLP and vocabulary."""
    dcn: DcnConfig = DcnConfig()
    """Degrees between slices."""
    context_attention: ContextAttention = "ring"
    """Attention with context parallelism. ring: blocks of keys and values circulate, and no device holds more than two.
    all_gather: each device gathers all keys and values, which has less overhead if those of a row are small."""
    optimizer_state_memory: Literal["device", "host"] = "device"
    """Memory that holds the matrices of the optimizer's state between the updates. host: that of the host, from where
    each step copies them to the devices and back."""
    topology: str | None = None
    """Machine that the run is meant for, as in `v5e:16x16`, or `2 x v5e:16x16` for two slices: the default of `plan`
    and `launch`. Training uses the devices that exist."""
    parameter_rules: tuple[tuple[str, str | None], ...] = ()
    """(logical axis, mesh axis or None) pairs for parameters that take precedence over the standard rules. A logical
    axis in several pairs is sharded over all their mesh axes, outermost first."""
    activation_rules: tuple[tuple[str, str | None], ...] = ()
    """Like parameter_rules, for activations."""

    @property
    def degrees(self) -> dict[str, int]:
        """Degree within a slice by mesh axis."""
        return {axis: getattr(self, axis) for axis in AXES}
