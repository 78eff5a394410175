"""The whole parameters of a directory, whether it holds them or adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from t5x_like import run_directory
from t5x_like.bases import restore_merged
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config import CheckpointConfig, LoraConfig, ModelConfig
from t5x_like.interop import imported
from t5x_like.models.build import abstract
from t5x_like.models.lora import adapt

Tree = Any


def lora_of(directory: Path) -> LoraConfig | None:
    """The adapters of the run in `directory`; None if it has none or is no run."""
    if (directory / imported.MODEL).is_file() or not (directory / run_directory.CONFIG).is_file():
        return None
    return run_directory.read_config(directory).training.lora


def restore_whole(directory: Path, model: ModelConfig, step: int | None) -> tuple[int, Tree, dict[str, Any]]:
    """A checkpoint's step, parameters and meta, on one device; adapters merged with their base.

    Raises:
      RefusedError: there is no such checkpoint, or its base is missing or another.
    """
    manager = CheckpointManager(directory / run_directory.CHECKPOINTS, CheckpointConfig(), read_only=True)
    whole = _on_one_device(abstract(model).params)
    lora = lora_of(directory)
    try:
        if lora is None:
            return manager.restore_params(whole, step)
        adaptation = adapt(lora, model)
        return restore_merged(manager, lora, model, adaptation, _on_one_device(adaptation.shapes), whole, step)
    finally:
        manager.close()


def _on_one_device(tree: Tree) -> Tree:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
