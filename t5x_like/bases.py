"""The frozen parameters that adapters belong to: where they are, and whether they are the right ones."""

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
from t5x_like.checkpoints import trees
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config import CheckpointConfig, LoraConfig, ModelConfig, RefusedError
from t5x_like.models.lora import Adaptation
from t5x_like.partitioning.rows import on_host

Tree = Any
RECORD = "base"
"""Where a checkpoint's meta names the base."""
IMPORTED = "model.json"
"""What describes the model in a directory that was imported."""
_HOW_NOT_WHAT = frozenset({"dtype", "attention", "scan_layers", "remat", "dropout_rate", "dropout_broadcast_length"})
"""Fields of a model that may differ from the base's without a word."""


@dataclasses.dataclass(frozen=True)
class Base:
    """A base that has been read.

    Attributes:
      params: Arrays, each placed as it was asked for.
      record: JSON values {"path", "step", "fingerprint"}: what a checkpoint remembers of it.
      differences: One line for each field in which its model differs from that of the run.
    """

    params: Tree
    record: dict[str, Any]
    differences: tuple[str, ...]


def open_base(
    config: LoraConfig, model: ModelConfig, abstract_params: Tree, recorded: Mapping[str, Any] | None = None
) -> Base:
    """Reads the base of a run's adapters.

    Args:
      config: Says where it is.
      model: The run's.
      abstract_params: The model's parameters, with shardings.
      recorded: What the adapters' checkpoint remembers of it; None for new adapters, which take the newest step.

    Raises:
      RefusedError: it is missing, damaged, of another shape, has adapters itself, or is not the one recorded.
    """
    directory = Path(config.base)
    checkpoints = directory / run_directory.CHECKPOINTS
    mend = "bring it back, or say where it is: --training.lora.base DIR"
    if not checkpoints.is_dir():
        raise RefusedError(f"the base of the adapters is not in {directory}: found no checkpoints there; {mend}")
    theirs = _describe(directory)
    if theirs.get("training", {}).get("lora"):
        fix = f"`t5x-like convert --merge {directory} OUT` and take OUT"
        raise RefusedError(f"the base {directory} is a run of adapters itself, expected whole parameters: {fix}")
    manager = CheckpointManager(checkpoints, CheckpointConfig(), read_only=True)
    try:
        # Its numbers tell whether it is the right one: an import of it has another step.
        known = recorded["step"] if recorded is not None and recorded["step"] in manager.steps() else None
        step, params, _ = manager.restore_params(abstract_params, known)
    finally:
        manager.close()
    record = {"path": str(directory), "step": step, "fingerprint": fingerprint(params)}
    if recorded is not None and recorded["fingerprint"] != record["fingerprint"]:
        raise RefusedError(
            f"the base {directory}, step {step}: found parameters with the fingerprint {record['fingerprint']}, "
            f"expected {recorded['fingerprint']}, to which the adapters belong (then in {recorded['path']}); {mend}"
        )
    ours = json.loads(json.dumps(dataclasses.asdict(model)))
    return Base(params, record, tuple(_differences(theirs.get("model") or {}, ours)))


def restore_merged(
    checkpoints: CheckpointManager,
    config: LoraConfig,
    model: ModelConfig,
    adaptation: Adaptation,
    abstract_adapters: Tree,
    abstract_base: Tree,
    step: int | None = None,
) -> tuple[int, Tree, dict[str, Any]]:
    """Like `CheckpointManager.restore_params`, of a run of adapters: the sums of base and adapters.

    Raises:
      RefusedError: there is no such checkpoint, or the base is not the one that it belongs to.
    """
    step, adapters, meta = checkpoints.restore_params(abstract_adapters, step)
    base = open_base(config, model, abstract_base, meta[RECORD])
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_base)
    params = jax.jit(adaptation.merged, donate_argnums=0, out_shardings=shardings)(base.params, adapters)
    return step, params, meta


def fingerprint(params: Tree) -> str:
    """Of the numbers and their paths: the same wherever they are stored and however they are split."""
    leaves = trees.by_path(params)
    digest = hashlib.sha256()
    for path, sums in zip(leaves, on_host(_sums(list(leaves.values()))), strict=True):
        digest.update(f"{path} {leaves[path].dtype}{leaves[path].shape} {sums.tolist()}\n".encode())
    return digest.hexdigest()[:32]


@jax.jit
def _sums(leaves: list[jax.Array]) -> jax.Array:
    """uint32 [leaves, 2]: sums modulo 2**32 of hashes of each number and its place, which have no order."""

    def of(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        place = jnp.zeros(x.shape, jnp.uint32)
        for dim, size in enumerate(x.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
        hashed = _mixed(bits ^ _mixed(place + jnp.uint32(0x9E3779B9)))
        return jnp.stack([jnp.sum(hashed), jnp.sum(_mixed(hashed ^ place))])

    return jnp.stack([of(leaf) for leaf in leaves])


def _mixed(x: jax.Array) -> jax.Array:
    """MurmurHash3's finalizer (Appleby 2011)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _describe(directory: Path) -> dict[str, Any]:
    """The JSON object beside the checkpoints; empty if there is none."""
    for name in (IMPORTED, run_directory.CONFIG):
        if (directory / name).is_file():
            try:
                found = json.loads((directory / name).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise RefusedError(f"{directory / name}: cannot be read ({error})") from None
            return found if isinstance(found, dict) else {}
    return {}


def _differences(theirs: Any, ours: Any, path: str = "model") -> list[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return [
            line
            for name in ours
            if name not in _HOW_NOT_WHAT and name in theirs
            for line in _differences(theirs[name], ours[name], f"{path}.{name}")
        ]
    return [] if theirs == ours else [f"{path}: {theirs!r} in the base, {ours!r} here"]
