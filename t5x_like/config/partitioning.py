"""How a run is split over devices: degrees of the mesh axes, within a slice and between slices, and rules."""

from __future__ import annotations

from typing import Literal

from t5x_like.config.base import configuration

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""The mesh axes, outermost first."""
ContextAttention = Literal["ring", "all_gather"]


@configuration
class DcnConfig:
    """Degrees between slices, over the data center's network; their product is the number of slices.

    A slice is what fast links join: a TPU slice, or the GPUs of one machine. An axis's size in the mesh is its degree
    within a slice times the one here. One of them may be -1: it takes the slices that are left. By default slices are
    copies of the model that share the batch: of all axes, data asks least of a slow network.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def degrees(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}


@configuration
class PartitioningConfig:
    """Degrees of the mesh axes within a slice; their product is the number of its devices. One of them may be -1: it
    takes the rest. Where there are no slices, all devices are one."""

    auto: bool = False
    """Choose the degrees for the devices that are found; the reason is printed. They are then not to be named here."""
    data: int = 1
    """Copies of the model, each with its share of the batch."""
    fsdp: int = -1
    """Shares of the batch that also share out the parameters."""
    expert: int = 1
    """Shares of the experts."""
    context: int = 1
    """Shares of each row's length."""
    tensor: int = 1
    """Shares of heads, MLP and vocabulary."""
    dcn: DcnConfig = DcnConfig()
    """Degrees between slices."""
    context_attention: ContextAttention = "ring"
    """How queries meet keys of other devices where context is above 1: "ring" sends blocks of keys and values round, so
    that none has more than two; "all_gather" gives each device all of them, which is less work to start where a row's
    are small."""
    topology: str | None = None
    """The machine that the run is made for, as in `v5e:16x16`, or `2 x v5e:16x16` for two slices: `plan` and `launch`
    take it where none is named. Training takes the devices that are there."""
    parameter_rules: tuple[tuple[str, str | None], ...] = ()
    """(logical axis, mesh axis or none) pairs that take precedence over the standard table for parameters. A logical
    axis in several pairs is split over all their mesh axes, outermost first."""
    activation_rules: tuple[tuple[str, str | None], ...] = ()
    """The same for activations."""

    @property
    def degrees(self) -> dict[str, int]:
        """Within a slice."""
        return {axis: getattr(self, axis) for axis in AXES}
