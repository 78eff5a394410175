"""Speed of training: tokens per second, seconds per step, and model FLOP utilisation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Peak:
    """Floating-point operations per second that all devices of a run could do, and where the number comes from."""

    flops_per_second: float
    source: str


def measured_peak(flops_per_second: float) -> Peak:
    """A peak that the caller has measured with a large matrix product over all devices."""
    return Peak(flops_per_second, "measured matrix product")


def rates(
    seconds: Mapping[str, float], *, steps: int, tokens: float, flops_per_step: float, peak: Peak | None
) -> dict[str, float]:
    """Metrics of an interval.

    Args:
      seconds: Wall-clock seconds by state (`Clock.lap`). Only "step" and "data_wait" count here: evaluation, saving
        and compilation have their place in the goodput.
      steps: Steps in the interval.
      tokens: Tokens that went into the model in the interval.
      flops_per_step: Model FLOPs of one training step: without what rematerialisation computes again.
      peak: Of all devices together; without one there is no "mfu".

    Returns:
      "seconds_per_step", "tokens_per_second", "data_wait_fraction", and "mfu" as a fraction.
    """
    busy = seconds["step"] + seconds["data_wait"]
    if steps == 0 or busy <= 0:
        return {}
    metrics = {
        "seconds_per_step": busy / steps,
        "tokens_per_second": tokens / busy,
        "data_wait_fraction": seconds["data_wait"] / busy,
    }
    if peak is not None and peak.flops_per_second > 0 and math.isfinite(flops_per_step):
        metrics["mfu"] = flops_per_step * steps / busy / peak.flops_per_second
    return metrics
