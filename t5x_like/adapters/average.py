"""`t5x-like average`: the mean of the parameters of several checkpoints of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from t5x_like import run_directory
from t5x_like.adapters.merge import write_whole
from t5x_like.adapters.restore import restore_whole
from t5x_like.checkpoints.opening import open_checkpoints
from t5x_like.config import CheckpointConfig
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.utils.sanitize import say
from t5x_like.utils.type_aliases import PyTree


def average_directory(
    directory: Path, out: Path, *, steps: Sequence[int] = (), last: int = 5, report: Callable[[str], None] = say
) -> None:
    """Write a run directory with the mean of the parameters of some checkpoints, under the newest of their steps.

    Adapters are merged with their base before.

    Args:
      directory: Directory of a run.
      out: Directory to write, which must not exist.
      steps: Steps of the checkpoints; empty for the newest ones.
      last: Number of checkpoints if `steps` is empty.
      report: Receives a line about the result.

    Raises:
      ConfigError: the directory is no run, or has fewer than two of the checkpoints.
      SafetyError: a checkpoint is missing or damaged, or `out` exists.
    """
    run = run_directory.read_config(directory)
    manager = open_checkpoints(directory, CheckpointConfig(), read_only=True)
    chosen = sorted(set(steps)) or manager.steps()[-last:]
    manager.close()
    if len(chosen) < 2:
        found = f"{len(chosen)} checkpoints" if not chosen else f"the checkpoint of step {chosen[0]} only"
        expected = "two checkpoints or more; checkpoints.max_to_keep and keep_period decide how many a run keeps"
        raise ConfigError([ConfigProblem(str(directory), found, expected)])
    total: PyTree = None
    for step in chosen:
        _, params, meta = restore_whole(directory, run.model, step)
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        total = wide if total is None else jax.tree.map(jnp.add, total, wide)
    mean = jax.tree.map(lambda x, like: (x / len(chosen)).astype(like.dtype), total, params)
    write_whole(directory, run, out, chosen[-1], mean, {**meta, "averaged": chosen})
    report(f"{out}: mean of the steps {', '.join(map(str, chosen))} of {directory}")
