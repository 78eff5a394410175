"""Checkpoints under faults: damaged files of every kind, kills at any moment, a full disk.

The law behind all of them: what is restored is bit for bit what was saved at a step that is named, or it is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.checkpoints.space import require_free_space, state_bytes
from t5x_like.config import CheckpointConfig, RefusedError

REPOSITORY = Path(__file__).parents[2]


def make_state(step: int, size: int = 64) -> dict[str, Any]:
    key = jax.random.fold_in(jax.random.key(0), step)
    kernel = jax.random.normal(key, (size, 32))
    return {"params": {"head": {"kernel": kernel}}, "opt_state": ({"mu": kernel * 0.1},), "step": jnp.int32(step)}


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


def digest(tree: Any) -> str:
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))).hexdigest()


def flip_one_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] if content else b"\1"


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def zero_a_block(content: bytes) -> bytes:
    return bytes(min(len(content), 4096)) + content[4096:]


def delete(content: bytes) -> None:
    return None


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints, copied by those that damage them."""
    directory = tmp_path_factory.mktemp("saved")
    manager = CheckpointManager(directory, CheckpointConfig())
    for step in (10, 20, 30):
        manager.save(step, make_state(step), {"step": step})
    manager.close()
    return directory


def files(step_directory: Path) -> list[str]:
    return sorted(p.relative_to(step_directory).as_posix() for p in step_directory.rglob("*") if p.is_file())


def kind(name: str) -> str:
    """The file's role: data files have random names."""
    return "/".join("<data>" if len(part) == 32 else part for part in name.split("/"))


def test_all_kinds_of_files_are_known(saved: Path):
    """The next test walks over what is there; this one says what that must include."""
    kinds = {kind(name) for name in files(saved / "30")}
    for item in ("params", "training"):
        assert {f"{item}/{part}" for part in ("_METADATA", "manifest.ocdbt", "ocdbt.process_0/d/<data>")} <= kinds
    assert {"SHA256SUMS", "meta.json", "_CHECKPOINT_METADATA"} <= kinds


@pytest.mark.parametrize("fault", [flip_one_bit, truncate, zero_a_block, delete])
def test_damaged_file_of_any_kind_falls_back(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: Callable[[bytes], bytes | None]
):
    wanted = abstract(make_state(0))
    damaged = 0
    for number, name in enumerate(files(saved / "30")):
        directory = tmp_path / str(number)
        shutil.copytree(saved, directory)
        content = (directory / "30" / name).read_bytes()
        changed = fault(content)
        if changed == content:
            continue  # an empty file cannot be cut
        if changed is None:
            (directory / "30" / name).unlink()
        else:
            (directory / "30" / name).write_bytes(changed)
        damaged += 1
        caplog.clear()
        manager = CheckpointManager(directory, CheckpointConfig())
        step, state, meta = manager.restore(wanted)
        manager.close()
        assert (step, meta) == (20, {"step": 20}), name
        assert digest(state) == digest(make_state(20)), name
        assert "10 steps are lost" in caplog.text and str(directory / "30") in caplog.text, name
        # Damage to the list of checksums itself may be found as damage of the file that it lists wrongly.
        assert name == "SHA256SUMS" or f"{name}: " in caplog.text
        assert manager.steps() == [10, 20]
    assert damaged >= len(files(saved / "30")) - 1


def test_two_damaged_checkpoints_fall_back_by_two(saved: Path, tmp_path: Path):
    directory = tmp_path / "copy"
    shutil.copytree(saved, directory)
    (directory / "30" / "meta.json").unlink()
    (directory / "20" / "training" / "_METADATA").unlink()
    step, state, _ = CheckpointManager(directory, CheckpointConfig()).restore(abstract(make_state(0)))
    assert step == 10 and digest(state) == digest(make_state(10))


def test_no_intact_checkpoint_is_refused_and_left_alone(saved: Path, tmp_path: Path):
    directory = tmp_path / "copy"
    shutil.copytree(saved, directory)
    for step in (10, 20, 30):
        file = directory / str(step) / "params" / "manifest.ocdbt"
        file.write_bytes(flip_one_bit(file.read_bytes()))
    with pytest.raises(RefusedError) as refusal:
        CheckpointManager(directory, CheckpointConfig()).restore(abstract(make_state(0)))
    assert refusal.value.exit_code == 3
    for step in (10, 20, 30):
        assert f"step {step}: params/manifest.ocdbt: not the content that was saved" in str(refusal.value)
    assert sorted(path.name for path in directory.iterdir()) == ["10", "20", "30"]


def run_and_kill(directory: Path, log: dict[int, str], moment: str, delay: float) -> None:
    """Starts the saver, kills it `delay` seconds after its first save began (or lets it kill itself)."""
    command = [sys.executable, str(Path(__file__).with_name("saver.py")), str(directory), moment]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        if moment == "any":
            time.sleep(delay)
            process.kill()
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -9
    lines = (first + rest).splitlines(keepends=True)
    log.update(tuple(json.loads(line)) for line in lines if line.endswith("\n"))  # type: ignore[arg-type]


def assert_sound(directory: Path, log: dict[int, str]) -> int:
    """Every listed step is restored bit for bit; a new manager leaves no remains. Returns the newest step."""
    manager = CheckpointManager(directory, CheckpointConfig(keep_last=2))
    steps = manager.steps()
    assert {path.name for path in directory.iterdir()} == set(map(str, steps))
    assert 1 <= len(steps) <= 3
    for step in steps:
        found, state, _ = manager.restore(abstract(make_state(0, size=4096)), step=step)
        assert found == step and digest(state) == log[step]
    manager.close()
    return steps[-1]


def test_killed_at_random_moments(tmp_path: Path):
    """Each life goes on from what the one before left."""
    rng, log, newest = random.Random(0), {}, 0
    for _ in range(5):
        run_and_kill(tmp_path, log, "any", delay=rng.uniform(0.15, 0.6))
        now = assert_sound(tmp_path, log)
        assert now > newest
        newest = now


@pytest.mark.parametrize(
    "moment",
    [
        "integrity._sha256",  # the arrays are committed, there are no checksums
        "integrity.sync_directory",  # the checksums are written, the name is still the preliminary one
        "Path.rename",  # everything is written but the name
        "os.rmdir",  # an old checkpoint is half removed
    ],
)
def test_killed_at_a_chosen_moment(tmp_path: Path, moment: str):
    log: dict[int, str] = {}
    run_and_kill(tmp_path, log, moment, delay=0)
    # The fourth save died: before its renaming it does not count, after it does.
    assert assert_sound(tmp_path, log) == (4 if moment == "os.rmdir" else 3)


def assert_full_disk_is_survived(directory: Path, saved: list[int], reason: str) -> None:
    """Saves until it fails; then checks the message, that nothing is left over, and what was saved before."""
    config = CheckpointConfig(keep_last=3)
    manager = CheckpointManager(directory, config)
    with pytest.raises(RefusedError) as refusal:
        for step in range(1, 10):
            manager.save(step, make_state(step, size=1 << 15), {})
            manager.wait()
    message = str(refusal.value)
    assert refusal.value.exit_code == 3
    size = state_bytes(make_state(0, size=1 << 15))
    assert reason in message and f"{size:,} bytes" in message and str(saved or "none") in message
    assert manager.steps() == saved
    assert {path.name for path in directory.iterdir()} == set(map(str, saved))
    if saved:
        step, state, _ = manager.restore(abstract(make_state(0, size=1 << 15)))
        assert step == saved[-1] and digest(state) == digest(make_state(step, size=1 << 15))
    manager.close()


@pytest.fixture
def small_disk(mount_disk: Callable[[int], Path]) -> Path:
    """A file system of 20 MiB."""
    return mount_disk(20)


def test_full_disk(small_disk: Path):
    """8 MiB each: two fit, the third does not, before any is removed."""
    assert_full_disk_is_survived(small_disk / "checkpoints", [1, 2], "No space left on device")


def test_disk_that_will_be_too_small_is_refused_at_the_start(small_disk: Path):
    size = state_bytes(make_state(0, size=1 << 15))
    with pytest.raises(RefusedError, match="20,971,520 bytes are free"):
        require_free_space(small_disk, size, CheckpointConfig(keep_last=3))
    require_free_space(small_disk, size, CheckpointConfig(keep_last=1))


def test_file_size_limit(tmp_path: Path):
    """The same for those who may not mount: the system refuses to let files grow."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        assert_full_disk_is_survived(tmp_path / "checkpoints", [], "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
