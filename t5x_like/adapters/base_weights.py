"""Base weights of adapters: reading the frozen parameters, and checking that the adapters belong to them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from t5x_like import run_directory
from t5x_like.adapters.lora import LoraSpec
from t5x_like.checkpoints import model_dir
from t5x_like.checkpoints.interface import Checkpoints
from t5x_like.checkpoints.opening import open_checkpoints
from t5x_like.config import CheckpointConfig, LoraConfig, ModelConfig
from t5x_like.errors import SafetyError
from t5x_like.sharding.batch_placement import on_host
from t5x_like.storage.mirror import local_copy, original
from t5x_like.utils import tree_paths
from t5x_like.utils.json_reader import read_json
from t5x_like.utils.type_aliases import PyTree

BASE = "training.lora.base"
"""Name of the field with the directory of the base."""
RECORD = "base"
"""Key of a checkpoint's meta under which it records the base."""
_EXECUTION_FIELDS = frozenset(
    {"dtype", "attention", "scan_layers", "remat", "dropout_rate", "dropout_broadcast_length"}
)
"""Fields of a model that do not change what it computes without dropout; a difference from the base is not reported."""


@dataclasses.dataclass(frozen=True)
class Base:
    """Base weights that have been read.

    Attributes:
      params: Parameters with the requested shardings.
      record: JSON values {"path", "step", "fingerprint"} that the adapters' checkpoint keeps.
      differences: One line for each field in which the base's model differs from that of the run.
    """

    params: PyTree
    record: dict[str, Any]
    differences: tuple[str, ...]


def open_base(
    config: LoraConfig, model: ModelConfig, abstract_params: PyTree, recorded: Mapping[str, Any] | None = None
) -> Base:
    """Read the base of a run's adapters.

    Args:
      config: Adapter configuration with the directory of the base.
      model: Model of the run.
      abstract_params: Parameters of the model as `jax.ShapeDtypeStruct`s with shardings.
      recorded: Record in the adapters' checkpoint; None for new adapters, which take the newest step.

    Raises:
      SafetyError: the base is missing, damaged, of another shape, has adapters itself, or is not the recorded one.
    """
    directory = local_copy(config.base, BASE)
    fix = "restore it, or name its directory by --training.lora.base DIR"
    if not (directory / run_directory.CHECKPOINTS).is_dir():
        raise SafetyError(
            f"the base of the adapters is not in {original(directory)}: found no checkpoints there; {fix}"
        )
    base_document = _describe(directory)
    if base_document.get("training", {}).get("lora"):
        merge = f"`t5x-like convert --merge {directory} OUT` and take OUT"
        raise SafetyError(f"the base {directory} is a run of adapters itself, expected whole parameters: {merge}")
    manager = open_checkpoints(directory, CheckpointConfig(), read_only=True)
    try:
        # An import of the recorded run has another step. The fingerprint below decides whether it is the right base.
        known_step = recorded["step"] if recorded is not None and recorded["step"] in manager.steps() else None
        step, params, _ = manager.restore_params(abstract_params, known_step)
    finally:
        manager.close()
    record = {"path": original(directory), "step": step, "fingerprint": fingerprint(params)}
    if recorded is not None and recorded["fingerprint"] != record["fingerprint"]:
        raise SafetyError(
            f"the base {directory}, step {step}: found parameters with the fingerprint {record['fingerprint']}, "
            f"expected {recorded['fingerprint']}, to which the adapters belong (recorded at {recorded['path']}); {fix}"
        )
    own = json.loads(json.dumps(dataclasses.asdict(model)))
    return Base(params, record, tuple(_differences(base_document.get("model") or {}, own)))


def restore_merged(
    checkpoints: Checkpoints,
    config: LoraConfig,
    model: ModelConfig,
    lora_spec: LoraSpec,
    abstract_adapters: PyTree,
    abstract_base: PyTree,
    step: int | None = None,
) -> tuple[int, PyTree, dict[str, Any]]:
    """Return what `CheckpointManager.restore_params` returns, with the adapters of a run merged into their base.

    Raises:
      SafetyError: there is no such checkpoint, or the base is not the one that the adapters belong to.
    """
    step, adapters, meta = checkpoints.restore_params(abstract_adapters, step)
    base = open_base(config, model, abstract_base, meta[RECORD])
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_base)
    params = jax.jit(lora_spec.merged, donate_argnums=0, out_shardings=shardings)(base.params, adapters)
    return step, params, meta


def fingerprint(params: PyTree) -> str:
    """Return a digest of the values and their paths, which does not depend on where they are stored or how they are
    sharded."""
    leaves = tree_paths.by_path(params)
    digest = hashlib.sha256()
    for path, sums in zip(leaves, on_host(_sums(list(leaves.values()))), strict=True):
        digest.update(f"{path} {leaves[path].dtype}{leaves[path].shape} {sums.tolist()}\n".encode())
    return digest.hexdigest()[:32]


@jax.jit
def _sums(leaves: list[jax.Array]) -> jax.Array:
    """Return uint32 [leaves, 2]: two sums modulo 2**32 of hashes of each value with its index. Sums do not depend on
    the order in which a sharded array is reduced."""

    def leaf_sums(x: jax.Array) -> jax.Array:
        # As the bits of a float32: one hash function serves every float type.
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        # Row-major index of each value, modulo 2**32.
        index = jnp.zeros(x.shape, jnp.uint32)
        for dim, size in enumerate(x.shape):
            # The index makes the hash depend on where a value is: exchanged rows have another digest.
            index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
        hashed = _mixed(bits ^ _mixed(index + jnp.uint32(0x9E3779B9)))
        return jnp.stack([jnp.sum(hashed), jnp.sum(_mixed(hashed ^ index))])

    return jnp.stack([leaf_sums(leaf) for leaf in leaves])


def _mixed(x: jax.Array) -> jax.Array:
    """Return the finalizer of MurmurHash3 (Appleby 2011) of each value."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _describe(directory: Path) -> dict[str, Any]:
    """Return the JSON object of model.json or config.json in a directory; empty if it has neither."""
    for name in (model_dir.MODEL, run_directory.CONFIG):
        if (directory / name).is_file():
            try:
                found = read_json(directory / name)
            except (OSError, ValueError) as error:
                raise SafetyError(f"{directory / name}: cannot be read ({error})") from None
            return found if isinstance(found, dict) else {}
    return {}


def _differences(base: Any, own: Any, path: str = "model") -> list[str]:
    if isinstance(base, dict) and isinstance(own, dict):
        return [
            line
            for name in own
            if name not in _EXECUTION_FIELDS and name in base
            for line in _differences(base[name], own[name], f"{path}.{name}")
        ]
    return [] if base == own else [f"{path}: {base!r} in the base, {own!r} here"]
