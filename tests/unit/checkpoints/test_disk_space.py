"""Arithmetic of the disk space for checkpoints."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from t5x_like.checkpoints import disk_space
from t5x_like.config import CheckpointConfig
from t5x_like.errors import SafetyError

MIB = 1 << 20
Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("config", "steps", "expected"),
    [
        (CheckpointConfig(max_to_keep=3), None, 4),
        (CheckpointConfig(max_to_keep=3, save_every_steps=100), 1000, 4),
        (CheckpointConfig(max_to_keep=3, save_every_steps=100), 150, 2),
        (CheckpointConfig(max_to_keep=3, save_every_steps=100), 50, 1),
        (CheckpointConfig(max_to_keep=2, save_every_steps=100, keep_period=200), 1000, 8),
    ],
)
def test_checkpoints_at_once(config: CheckpointConfig, steps: int | None, expected: int):
    assert disk_space.checkpoints_at_once(config, steps) == expected


def test_bytes_of_a_state_are_those_of_its_arrays():
    state = {"a": jnp.zeros((3, 5), jnp.bfloat16), "b": [jax.ShapeDtypeStruct((), jnp.int32)]}
    assert disk_space.state_bytes(state) == 3 * 5 * 2 + 4


def test_error_states_needed_and_free_space(tmp_path: Path, monkeypatch):
    directory = tmp_path / "run" / "checkpoints"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 43 * MIB))
    # Four at once, each with 1 MiB for metadata.
    with pytest.raises(SafetyError, match="46,137,344 bytes are needed .*45,088,768 bytes are free") as refusal:
        disk_space.require_free_space(directory, 10 * MIB, CheckpointConfig(max_to_keep=3))
    assert refusal.value.exit_code == 3
    assert not directory.exists()
    disk_space.require_free_space(directory, 10 * MIB, CheckpointConfig(max_to_keep=2))


def test_existing_checkpoints_of_the_run_count_as_available_space(tmp_path: Path, monkeypatch):
    """A resumed run does not need its old checkpoints a second time."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 33 * MIB))
    (tmp_path / "somebody's file").write_bytes(bytes(11 * MIB))
    with pytest.raises(SafetyError):
        disk_space.require_free_space(tmp_path, 10 * MIB, CheckpointConfig(max_to_keep=3))
    (tmp_path / "10").mkdir()
    (tmp_path / "10" / "array").write_bytes(bytes(11 * MIB))
    disk_space.require_free_space(tmp_path, 10 * MIB, CheckpointConfig(max_to_keep=3))
