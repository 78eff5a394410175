"""A roofline: the least time that a compiled step can take by what it computes and moves. No measurement, no forecast.

Four times are set beside each other, each as if nothing else had to be waited for: arithmetic (FLOPs of the model by
formula, and those that rematerialisation repeats, over the chips' peak), memory (bytes that XLA's program moves, over
its bandwidth), links within a slice and the network between slices (bytes that a device sends, over theirs). A step
cannot be faster than the longest; were nothing overlapped, it would take their sum. What keeps real steps from it
(small products, latencies, the host) is not in it.
"""

from __future__ import annotations

import dataclasses

from t5x_like.config import RunConfig, batch_spec
from t5x_like.models.parameters import forward_flops
from t5x_like.planning.compile import Compiled

_FORWARD_PASSES = {"none": 3.0, "dots": 3.0, "full": 4.0}
"""Passes worth of matrix products in a step: one forward, two backward, and one again where all is redone."""


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step; `model_flops` are those of all devices without what is repeated."""

    model_flops: float
    compute: float
    memory: float
    links: float
    network: float

    @property
    def parts(self) -> dict[str, float]:
        return {"compute": self.compute, "memory": self.memory, "links": self.links, "network": self.network}

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


def training_roofline(run: RunConfig, compiled: Compiled) -> Roofline:
    """The roofline of a compiled training step."""
    forward = float(sum(forward_flops(run.model, features) for features in batch_spec(run).values()))
    return roofline(compiled, 3.0 * forward, _FORWARD_PASSES[run.model.remat] * forward)


def roofline(compiled: Compiled, model_flops: float, computed_flops: float) -> Roofline:
    """The roofline of a compiled step.

    Args:
      compiled: Of a program that fits.
      model_flops: Of all devices.
      computed_flops: With what is computed again.
    """
    accelerator = compiled.topology.accelerator
    parts = accelerator.devices_per_chip
    between = sum(each.sent_between_slices for each in compiled.collectives)
    within = sum(each.sent for each in compiled.collectives) - between
    return Roofline(
        model_flops=model_flops,
        compute=computed_flops / compiled.topology.flops_per_second,
        memory=compiled.traffic_bytes / (accelerator.hbm_bytes_per_second / parts),
        links=within / (accelerator.link_bytes_per_second / parts),
        network=between / (accelerator.network_bytes_per_second / parts),
    )
