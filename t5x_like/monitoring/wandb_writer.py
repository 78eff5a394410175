"""Metric writer "wandb": Weights & Biases (the `wandb` extra).

W&B's own variables apply: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE (offline), WANDB_API_KEY.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5x_like.monitoring.writers import Writer, register_writer
from t5x_like.utils.json_reader import read_json

RUN_ID = "wandb_run_id"
"""File of the run directory with W&B's id of the run, so that a restart continues it."""
_PROJECT = "t5x_like"


class WandbWriter:
    """Writer to a run of W&B. Its files are in `wandb` in the run directory."""

    def __init__(self, run_dir: Path) -> None:
        """Begin the run, or continue it.

        Raises:
          ImportError: wandb is not installed.
        """
        import wandb

        run_dir.mkdir(parents=True, exist_ok=True)
        id_file, config = run_dir / RUN_ID, run_dir / "config.json"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=run_dir.absolute().name,
            id=id_file.read_text(),
            resume="allow",
            dir=run_dir,
            config=read_json(config) if config.exists() else None,
            settings=wandb.Settings(console="off", quiet=True),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # W&B ignores steps below the last one: after a restart they are written again, with equal values.
        self._run.log(dict(values), step=step, commit=True)

    def close(self) -> None:
        self._run.finish()


@register_writer("wandb")
def _wandb(run_dir: Path, restored_step: int | None) -> Writer:
    return WandbWriter(run_dir)
