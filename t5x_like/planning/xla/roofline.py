"""Roofline: lower bounds on the time of a compiled step by what it computes and moves. Not a measurement or a forecast.

Four times are computed, each as if nothing else took time: arithmetic (FLOPs that the devices execute, by formula, over
the chips' peak), memory (bytes that XLA's program moves, over memory bandwidth), links within a slice and the network
between slices (bytes that a device sends, over their bandwidth). A step cannot be faster than the longest of them;
without any overlap it would take their sum. Small products, latencies and the host make real steps slower; they are not
modeled.
"""

from __future__ import annotations

import dataclasses

from t5x_like.planning.xla.aot_compile import CompiledStep


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Lower bounds of a step in seconds, by resource."""

    compute: float
    memory: float
    links: float
    network: float

    @property
    def parts(self) -> dict[str, float]:
        return dataclasses.asdict(self)

    @property
    def bound(self) -> str:
        """Name of the resource that takes longest."""
        return max(self.parts, key=self.parts.__getitem__)

    @property
    def min_seconds(self) -> float:
        return max(self.parts.values())

    @property
    def without_overlap(self) -> float:
        return sum(self.parts.values())


def roofline(compiled: CompiledStep) -> Roofline:
    """Return the roofline of a step that fits."""
    accelerator = compiled.topology.accelerator
    parts = accelerator.devices_per_chip
    between = sum(each.sent_between_slices for each in compiled.collectives)
    within = sum(each.sent for each in compiled.collectives) - between
    return Roofline(
        compute=compiled.executed_flops / compiled.topology.flops_per_second,
        memory=compiled.traffic_bytes / (accelerator.hbm_bytes_per_second / parts),
        links=within / (accelerator.link_bytes_per_second / parts),
        network=between / (accelerator.network_bytes_per_second / parts),
    )
