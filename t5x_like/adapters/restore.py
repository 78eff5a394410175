"""Restoring of whole parameters from a directory that holds them, or adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like import run_directory
from t5x_like.adapters.base_weights import restore_merged
from t5x_like.adapters.lora import lora_spec
from t5x_like.checkpoints import model_dir
from t5x_like.checkpoints.interface import Checkpoints
from t5x_like.checkpoints.opening import open_checkpoints
from t5x_like.config import CheckpointConfig, LoraConfig, ModelConfig
from t5x_like.models.factory import abstract_model
from t5x_like.utils.type_aliases import PyTree


def lora_of(directory: Path) -> LoraConfig | None:
    """Return the adapters of the run in `directory`; None if it has none or is not a run."""
    if (directory / model_dir.MODEL).is_file() or not (directory / run_directory.CONFIG).is_file():
        return None
    return run_directory.read_config(directory).training.lora


def restore_whole(
    directory: Path, model: ModelConfig, step: int | None, wanted: PyTree | None = None
) -> tuple[int, PyTree, dict[str, Any]]:
    """Return a checkpoint's step, parameters and meta, with adapters merged into their base.

    Args:
      wanted: Parameters as `jax.ShapeDtypeStruct`s with shardings; None: all on one device.

    Raises:
      RefusedError: there is no such checkpoint, or its base is missing or another.
    """
    checkpoints = open_checkpoints(directory, CheckpointConfig(), read_only=True)
    if wanted is None:
        wanted = _placed(abstract_model(model).params, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    try:
        return restore_with_adapters(checkpoints, lora_of(directory), model, step, wanted)
    finally:
        checkpoints.close()


def restore_with_adapters(
    checkpoints: Checkpoints, lora: LoraConfig | None, model: ModelConfig, step: int | None, wanted: PyTree
) -> tuple[int, PyTree, dict[str, Any]]:
    """Return a checkpoint's step, parameters and meta; see `restore_whole`.

    Args:
      lora: Adapters of the run; None if it trains whole parameters.
      wanted: Parameters as `jax.ShapeDtypeStruct`s with shardings.
    """
    if lora is None:
        return checkpoints.restore_params(wanted, step)
    spec = lora_spec(lora, model)
    sharding = jax.tree.leaves(wanted)[0].sharding
    if isinstance(sharding, NamedSharding):
        # Adapters are small: they are replicated on every device of the mesh.
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return restore_merged(checkpoints, lora, model, spec, _placed(spec.shapes, sharding), wanted, step)


def _placed(tree: PyTree, sharding: Any) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
