"""The arithmetic of the room for checkpoints."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from t5x_like.checkpoints import space
from t5x_like.config import CheckpointConfig, RefusedError

MIB = 1 << 20
Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("config", "steps", "expected"),
    [
        (CheckpointConfig(keep_last=3), None, 4),
        (CheckpointConfig(keep_last=3, save_every_steps=100), 1000, 4),
        (CheckpointConfig(keep_last=3, save_every_steps=100), 150, 2),
        (CheckpointConfig(keep_last=3, save_every_steps=100), 50, 1),
        (CheckpointConfig(keep_last=2, save_every_steps=100, keep_every_steps=200), 1000, 8),
    ],
)
def test_checkpoints_at_once(config: CheckpointConfig, steps: int | None, expected: int):
    assert space.checkpoints_at_once(config, steps) == expected


def test_bytes_of_a_state_are_those_of_its_arrays():
    state = {"a": jnp.zeros((3, 5), jnp.bfloat16), "b": [jax.ShapeDtypeStruct((), jnp.int32)]}
    assert space.state_bytes(state) == 3 * 5 * 2 + 4


def test_refusal_says_needed_and_free(tmp_path: Path, monkeypatch):
    directory = tmp_path / "run" / "checkpoints"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 43 * MIB))
    # Four at once, each with 1 MiB for metadata.
    with pytest.raises(RefusedError, match="46,137,344 bytes are needed .*45,088,768 bytes are free") as refusal:
        space.require_free_space(directory, 10 * MIB, CheckpointConfig(keep_last=3))
    assert refusal.value.exit_code == 3
    assert not directory.exists()
    space.require_free_space(directory, 10 * MIB, CheckpointConfig(keep_last=2))


def test_what_is_there_already_counts_as_ours(tmp_path: Path, monkeypatch):
    """A resumed run does not need its old checkpoints a second time."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 33 * MIB))
    (tmp_path / "somebody's file").write_bytes(bytes(11 * MIB))
    with pytest.raises(RefusedError):
        space.require_free_space(tmp_path, 10 * MIB, CheckpointConfig(keep_last=3))
    (tmp_path / "10").mkdir()
    (tmp_path / "10" / "array").write_bytes(bytes(11 * MIB))
    space.require_free_space(tmp_path, 10 * MIB, CheckpointConfig(keep_last=3))
