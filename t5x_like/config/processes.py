"""What the command line says of the processes that work together. Not part of a run: it may differ at each start."""

from __future__ import annotations

import dataclasses
from typing import Literal

Launcher = Literal[
    "auto", "flags", "jax", "skypilot", "torchrun", "ompi", "slurm", "gcetpu", "gketpu", "kubernetes", "single"
]
"""In the order in which they are looked for; auto takes the first that is there."""


@dataclasses.dataclass(frozen=True)
class ProcessFlags:
    """The flags; None where not given.

    Attributes:
      coordinator: "host:port" at which process 0 waits for the others.
      local_device_ids: The GPUs of this process.
      launcher: The only one to look for; auto: all.
      expect_processes, expect_devices: Counts without which nothing is started.
      timeout_seconds: For which processes wait for each other at the start.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None
    launcher: Launcher = "auto"
    expect_processes: int | None = None
    expect_devices: int | None = None
    timeout_seconds: int = 600
