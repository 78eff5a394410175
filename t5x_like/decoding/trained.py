"""A run that has been trained, opened from its directory: what evaluation and generation start from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from t5x_like import run_directory
from t5x_like.bases import restore_merged
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config import RefusedError, RunConfig
from t5x_like.data.prepare import open_stores
from t5x_like.data.store import Store
from t5x_like.data.stream import Stream
from t5x_like.program import Program, assemble


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run's program and data, and its checkpoints, of which only the parameters are read."""

    run: RunConfig
    program: Program
    stores: tuple[Store, ...]
    checkpoints: CheckpointManager

    @property
    def store(self) -> Store:
        """The first store; its tokenizer is that of all.

        Raises:
          DataError: the run has none: it reads a seqio Task live.
        """
        if not self.stores:
            open_stores(self.run.data)
        return self.stores[0]

    def params(self, step: int | None = None) -> tuple[int, Any]:
        """A checkpoint's step and parameters, each placed where the program wants it; None takes the newest. Adapters
        come merged with their base.

        Raises:
          RefusedError: there is no such checkpoint or it is not intact, or it was trained on other data, or its
            adapters belong to another base.
        """
        step, params, meta = self._restore(step)
        if not self.stores:
            return step, params
        trained_on = meta["data"]["fingerprint"]
        found = Stream(self.stores, self.run.data, self.run.training.batch_size).fingerprint
        if found != trained_on:
            raise RefusedError(
                f"{self.store.path}: found data with the fingerprint {found}, expected {trained_on}, on which the "
                "checkpoint was trained: with another tokenizer its ids would mean other text. Bring the store of the "
                "run back."
            )
        return step, params

    def _restore(self, step: int | None) -> tuple[int, Any, dict[str, Any]]:
        program, lora = self.program, self.run.training.lora
        if lora is None or program.adaptation is None:
            return self.checkpoints.restore_params(program.abstract_params, step)
        return restore_merged(
            self.checkpoints,
            lora,
            self.run.model,
            program.adaptation,
            program.abstract_params,
            program.abstract_base,
            step,
        )


def open_trained(run_dir: Path, devices: Sequence[Any] | None = None) -> Trained:
    """Opens the run in `run_dir` on these devices, by default on all; nothing in the directory is changed.

    Raises:
      ConfigError: there is no run, or it does not fit the devices.
      DataError: the run's token store, which holds the tokenizer, is missing.
    """
    run = run_directory.read_config(run_dir)
    stores = () if run.data.seqio is not None else open_stores(run.data)
    checkpoints = CheckpointManager(run_dir / run_directory.CHECKPOINTS, run.checkpoints, read_only=True)
    return Trained(run, assemble(run, jax.devices() if devices is None else devices), stores, checkpoints)
