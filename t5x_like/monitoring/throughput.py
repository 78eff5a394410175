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


# Dense bfloat16 matrix products, by `jax.Device.device_kind`: one TPU chip (Google Cloud's TPU documentation), one GPU
# without sparsity (NVIDIA's data sheets). The first name that the kind contains counts.
_BFLOAT16_PEAKS = (
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),  # v5p
    ("TPU v4", 275e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
)


def known_peak(device_kind: str, num_devices: int) -> Peak | None:
    """Peak of `num_devices` accelerators of a kind; None where the kind is not in the table (a CPU: measure it)."""
    for name, flops_per_second in _BFLOAT16_PEAKS:
        if name in device_kind:
            return Peak(flops_per_second * num_devices, f"{num_devices} x {name}, dense bfloat16 by data sheet")
    return None


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
