"""References to checkpoints on the command line and in the Python API: `DIR`, `DIR:STEP` or `DIR:STEP,STEP`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.utils.trusted_urls import scheme_of

_WITH_STEPS = re.compile(r"(.+):(\d+(?:,\d+)*)")


@dataclasses.dataclass(frozen=True)
class CheckpointRef:
    """A model directory and the steps that were named with it.

    Attributes:
      path: Directory of the model.
      steps: Named steps; empty for the newest.
    """

    path: Path
    steps: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> CheckpointRef:
        """Parse a reference. A directory whose own name ends like a step is taken as it is.

        A URL of an object store (gs://, s3://) becomes a local directory, which `storage.mirror.fetch` fills.

        Raises:
          ConfigError: a URL of another service.
        """
        # The number at the end of an endpoint is a port.
        match = None if "endpoint=" in text else _WITH_STEPS.fullmatch(text)
        if match is None or Path(text).exists():
            return cls(_directory(text))
        return cls(_directory(match[1]), tuple(int(step) for step in match[2].split(",")))

    @property
    def step(self) -> int | None:
        """The named step; None for the newest.

        Raises:
          ConfigError: several steps are named.
        """
        if len(self.steps) > 1:
            named = ",".join(map(str, self.steps))
            raise ConfigError([ConfigProblem(f"{self.path}:{named}", f"{len(self.steps)} steps", "one step")])
        return next(iter(self.steps), None)


def _directory(text: str) -> Path:
    if not scheme_of(text):
        return Path(text)
    # TensorStore takes a second to import.
    from t5x_like.storage.mirror import path_to_read

    return path_to_read(text, "MODEL")


def missing_step(directory: Path, step: int, existing: Sequence[int]) -> ConfigProblem:
    """Return the problem of a named step that `directory` has no checkpoint of."""
    steps = f"one of the saved steps: {', '.join(map(str, existing))}" if existing else "a directory with checkpoints"
    return ConfigProblem(str(directory), f"no checkpoint of step {step}", steps)
