"""Metric writer of a service that answers twice and then never again, as a plug-in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from t5x_like.monitoring.writers import register_writer


@register_writer("broken")
class BrokenWriter:
    def __init__(self, run_dir: Path, restored_step: int | None):
        self._written = 0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._written += 1
        if self._written > 2:
            raise ConnectionError("the service does not answer")

    def close(self) -> None:
        raise ConnectionError("the service does not answer")
