"""Speed of training: tokens per second, seconds per step, and model FLOP utilization (MFU)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Peak:
    """Peak of all devices of a run together in floating-point operations per second, and the source of the number."""

    flops_per_second: float
    source: str
    measured: bool = False

    def at_least(self, flops_per_second: float) -> Peak:
        """Return this peak; if it was measured below what training has reached, the higher rate.

        A measurement at the start is too low on a machine that is busy at that moment.
        """
        if not self.measured or flops_per_second <= self.flops_per_second:
            return self
        return Peak(flops_per_second, "measured: the fastest steps so far", measured=True)


def measured_peak(flops_per_second: float) -> Peak:
    """Return a peak that was measured with a large matrix product over all devices."""
    return Peak(flops_per_second, "measured matrix product", measured=True)


def achieved(seconds: Mapping[str, float], *, steps: int, flops_per_step: float) -> float:
    """Return the model FLOP/s of an interval, as `rates` counts its time; 0 if it is empty."""
    busy = seconds["step"] + seconds["data_wait"]
    return flops_per_step * steps / busy if busy > 0 and math.isfinite(flops_per_step) else 0.0


def rates(
    seconds: Mapping[str, float], *, steps: int, tokens: float, flops_per_step: float, peak: Peak | None
) -> dict[str, float]:
    """Return the speed metrics of an interval.

    Args:
      seconds: Wall-clock seconds by state (`TimeTracker.lap`). Only "step" and "data_wait" count here; evaluation,
        saving and compilation are part of the goodput.
      steps: Number of steps in the interval.
      tokens: Number of tokens that went into the model in the interval.
      flops_per_step: Model FLOPs of one training step, without recomputation by rematerialization.
      peak: Peak of all devices together; without one there is no "mfu".

    Returns:
      "step_time_s", "tokens_per_second", "data_wait_fraction", and "mfu" as a fraction.
    """
    busy = seconds["step"] + seconds["data_wait"]
    if steps == 0 or busy <= 0:
        return {}
    metrics = {
        "step_time_s": busy / steps,
        "tokens_per_second": tokens / busy,
        "data_wait_fraction": seconds["data_wait"] / busy,
    }
    if peak is not None and peak.flops_per_second > 0 and math.isfinite(flops_per_step):
        metrics["mfu"] = flops_per_step * steps / busy / peak.flops_per_second
    return metrics
