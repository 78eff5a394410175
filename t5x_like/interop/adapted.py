"""The whole parameters of a directory, whether it holds them or adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

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


def restore_whole(
    directory: Path, model: ModelConfig, step: int | None, wanted: Tree | None = None
) -> tuple[int, Tree, dict[str, Any]]:
    """A checkpoint's step, parameters and meta; adapters merged with their base.

    Args:
      wanted: The parameters as `jax.ShapeDtypeStruct`s with shardings; None: all on one device.

    Raises:
      RefusedError: there is no such checkpoint, or its base is missing or another.
    """
    manager = CheckpointManager(directory / run_directory.CHECKPOINTS, CheckpointConfig(), read_only=True)
    if wanted is None:
        wanted = _placed(abstract(model).params, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    lora = lora_of(directory)
    try:
        if lora is None:
            return manager.restore_params(wanted, step)
        adaptation = adapt(lora, model)
        sharding = jax.tree.leaves(wanted)[0].sharding
        if isinstance(sharding, NamedSharding):
            # They are small: whole on every device of the mesh.
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        adapters = _placed(adaptation.shapes, sharding)
        return restore_merged(manager, lora, model, adaptation, adapters, wanted, step)
    finally:
        manager.close()


def _placed(tree: Tree, sharding: Any) -> Tree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
