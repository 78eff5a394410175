"""Command line flags for multi-process commands. They are not part of a run: they may differ at each start."""

from __future__ import annotations

import dataclasses
from typing import Literal

Launcher = Literal[
    "auto", "flags", "jax", "skypilot", "torchrun", "ompi", "slurm", "gcetpu", "gketpu", "kubernetes", "single"
]
"""Launchers in the order in which they are detected; auto takes the first one that is present."""


@dataclasses.dataclass(frozen=True)
class DistributedFlags:
    """Values of the flags; None if not given.

    Attributes:
      coordinator: "host:port" at which process 0 waits for the others.
      num_processes: Number of processes.
      process_id: Index of this process.
      local_device_ids: GPUs of this process.
      launcher: The only launcher to detect; auto detects all.
      expect_processes: Number of processes without which the command fails at startup.
      expect_devices: Number of devices without which the command fails at startup.
      timeout_seconds: Time for which processes wait for each other at startup.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None
    launcher: Launcher = "auto"
    expect_processes: int | None = None
    expect_devices: int | None = None
    timeout_seconds: int = 600
