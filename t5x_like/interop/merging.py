"""A run that trains adapters to a plain one that has the sums as its parameters."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import jax

from t5x_like import run_directory
from t5x_like.bases import RECORD
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config import CheckpointConfig, ConfigError, Problem
from t5x_like.config.serialization import to_dict, to_json
from t5x_like.interop import imported
from t5x_like.interop.adapted import restore_whole
from t5x_like.interop.huggingface.directories import KEPT


def merge_directory(
    directory: Path, out: Path, *, step: int | None = None, report: Callable[[str], None] = print
) -> None:
    """A run that trains adapters to one that has the sums as its parameters, for `eval`, `generate` and `convert`.

    Raises:
      ConfigError: the run has no adapters.
      RefusedError: see `restore_whole`; `out` is there already.
    """
    run = run_directory.read_config(directory)
    lora = run.training.lora
    if lora is None:
        raise ConfigError([Problem(str(directory), "a run without adapters", "one with training.lora")])
    step, params, meta = restore_whole(directory, run.model, step)
    plain = dataclasses.replace(run, training=dataclasses.replace(run.training, lora=None))
    base = Path(lora.base)
    with imported.made_whole(out) as partial:
        if (base / imported.MODEL).is_file():
            imported.describe(partial, run.model, imported.read_model(base)[1])
        if (base / KEPT).is_dir():
            shutil.copytree(base / KEPT, partial / KEPT)
        (partial / run_directory.CONFIG).write_text(to_json(plain), encoding="utf-8")
        meta = {name: value for name, value in meta.items() if name != RECORD} | {"config": to_dict(plain)}
        checkpoints = CheckpointManager(partial / run_directory.CHECKPOINTS, CheckpointConfig())
        try:
            checkpoints.save(step, {"params": params}, meta)
        finally:
            checkpoints.close()
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    report(f"{out}: step {step} of {directory} merged with {base}, {size:,} parameters")
