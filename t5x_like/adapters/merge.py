"""`t5x-like convert --merge`: merge the adapters of a run into its base."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from t5x_like import run_directory
from t5x_like.adapters.base_weights import BASE, RECORD
from t5x_like.adapters.restore import restore_whole
from t5x_like.checkpoints import model_dir
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.checkpoints.model_dir import HUGGINGFACE_DIR
from t5x_like.config import CheckpointConfig, RunConfig
from t5x_like.config.serialization import to_dict, to_json
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.storage.mirror import local_copy
from t5x_like.utils import tree_paths
from t5x_like.utils.sanitize import say
from t5x_like.utils.type_aliases import PyTree


def merge_directory(
    directory: Path, out: Path, *, step: int | None = None, report: Callable[[str], None] = say
) -> None:
    """Write a run whose parameters are the sums of base and adapters.

    Args:
      directory: Directory of a run with adapters.
      out: Directory to write, which must not exist.
      step: Step to merge; None for the newest.
      report: Receives a line about the result.

    Raises:
      ConfigError: the run has no adapters.
      RefusedError: see `restore_whole`; or `out` exists.
    """
    run = run_directory.read_config(directory)
    lora = run.training.lora
    if lora is None:
        raise ConfigError([ConfigProblem(str(directory), "a run without adapters", "one with training.lora")])
    step, params, meta = restore_whole(directory, run.model, step)
    tree_paths.require_finite(params, f"step {step} of {directory} merged with {lora.base}")
    write_whole(directory, run, out, step, params, meta)
    base = lora.base
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    report(f"{out}: step {step} of {directory} merged with {base}, {size:,} parameters")


def write_whole(directory: Path, run: RunConfig, out: Path, step: int, params: PyTree, meta: Mapping[str, Any]) -> None:
    """Write a run directory with one checkpoint of whole parameters, which can be used but not trained on.

    Args:
      directory: Directory of the run that the parameters come from; its tokenizer's files, or those of its base, are
        copied.
      run: Configuration of that run.
      out: Directory to write, which must not exist.
      step: Step of the checkpoint.
      params: Whole parameters, float32, without adapters.
      meta: Meta of the checkpoint.

    Raises:
      SafetyError: `out` exists or cannot be written.
    """
    training = dataclasses.replace(run.training, lora=None, ema_decay=None, parameter_type="float32")
    plain = dataclasses.replace(run, training=training)
    source = directory if run.training.lora is None else local_copy(run.training.lora.base, BASE)
    with model_dir.made_whole(out) as partial:
        if (source / model_dir.MODEL).is_file():
            model_dir.describe(partial, run.model, model_dir.read_model(source)[1])
        if (source / HUGGINGFACE_DIR).is_dir():
            shutil.copytree(source / HUGGINGFACE_DIR, partial / HUGGINGFACE_DIR)
        (partial / run_directory.CONFIG).write_text(to_json(plain), encoding="utf-8")
        kept = {name: value for name, value in meta.items() if name != RECORD} | {"config": to_dict(plain)}
        checkpoints = CheckpointManager(partial / run_directory.CHECKPOINTS, CheckpointConfig())
        try:
            checkpoints.save(step, {"params": params}, kept)
        finally:
            checkpoints.close()
