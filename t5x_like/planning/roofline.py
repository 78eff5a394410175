"""A roofline: the least time that a compiled step can take by what it computes and moves. No measurement, no forecast.

Four times are set beside each other, each as if nothing else had to be waited for: arithmetic (FLOPs that the devices
run, by formula, over the chips' peak), memory (bytes that XLA's program moves, over its bandwidth), links within a
slice and the network between slices (bytes that a device sends, over theirs). A step cannot be faster than the longest;
were nothing overlapped, it would take their sum. What keeps real steps from it (small products, latencies, the host)
is not in it.
"""

from __future__ import annotations

import dataclasses

from t5x_like.planning.compile import Compiled


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step, by what it waits for."""

    compute: float
    memory: float
    links: float
    network: float

    @property
    def parts(self) -> dict[str, float]:
        return dataclasses.asdict(self)

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.parts, key=self.parts.__getitem__)

    @property
    def least(self) -> float:
        return max(self.parts.values())

    @property
    def without_overlap(self) -> float:
        return sum(self.parts.values())


def roofline(compiled: Compiled) -> Roofline:
    """The roofline of a step that fits."""
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
