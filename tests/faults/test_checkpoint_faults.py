"""Checkpoints under faults: damaged files of every kind, kills at any time, a full disk.

In all cases the restored state is bit for bit the state that was saved at the reported step, or restoring is refused.
"""

from __future__ import annotations

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
import pytest
from helpers.checkpoint_examples import digest, make_state

from t5x_like.checkpoints.disk_space import require_free_space, state_bytes
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config import CheckpointConfig
from t5x_like.errors import SafetyError

REPOSITORY = Path(__file__).parents[2]


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


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
    """Return a directory with three checkpoints, which tests copy before they damage them."""
    directory = tmp_path_factory.mktemp("saved")
    manager = CheckpointManager(directory, CheckpointConfig())
    for step in (10, 20, 30):
        manager.save(step, make_state(step), {"step": step})
    manager.close()
    return directory


def files(step_directory: Path) -> list[str]:
    return sorted(p.relative_to(step_directory).as_posix() for p in step_directory.rglob("*") if p.is_file())


def kind(name: str) -> str:
    """Return the role of a file: data files have random names."""
    return "/".join("<data>" if len(part) == 32 else part for part in name.split("/"))


def test_checkpoint_has_all_expected_kinds_of_files(saved: Path):
    """The next test damages all files that exist; this one asserts which kinds these are."""
    kinds = {kind(name) for name in files(saved / "30")}
    for item in ("params", "training"):
        assert {f"{item}/{part}" for part in ("_METADATA", "manifest.ocdbt", "ocdbt.process_0/d/<data>")} <= kinds
    assert {"SHA256SUMS", "meta.json", "_CHECKPOINT_METADATA"} <= kinds


@pytest.mark.parametrize("fault", [flip_one_bit, truncate, zero_a_block, delete])
def test_damaged_file_of_any_kind_falls_back_to_the_previous_step(
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
            continue  # an empty file cannot be truncated
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
        # Damage to the list of checksums may be reported for the file whose checksum it changes.
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


def test_without_an_intact_checkpoint_restoring_is_refused_and_nothing_changes(saved: Path, tmp_path: Path):
    directory = tmp_path / "copy"
    shutil.copytree(saved, directory)
    for step in (10, 20, 30):
        file = directory / str(step) / "params" / "manifest.ocdbt"
        file.write_bytes(flip_one_bit(file.read_bytes()))
    with pytest.raises(SafetyError) as refusal:
        CheckpointManager(directory, CheckpointConfig()).restore(abstract(make_state(0)))
    assert refusal.value.exit_code == 3
    for step in (10, 20, 30):
        assert f"step {step}: params/manifest.ocdbt: not the content that was saved" in str(refusal.value)
    assert sorted(path.name for path in directory.iterdir()) == ["10", "20", "30"]


def run_and_kill(directory: Path, log: dict[int, str], moment: str, delay: float) -> None:
    """Start the saver, and kill it `delay` seconds after its third save was announced, or let it kill itself.

    A save waits for the one before it: when the third is announced, the first is complete, however slow the machine.
    """
    command = [sys.executable, "-m", "helpers.checkpoint_saver", str(directory), moment]
    path = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        first = process.stdout.readline() + process.stdout.readline() + process.stdout.readline()
        if moment == "any":
            time.sleep(delay)
            process.kill()
        rest, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == -9
    lines = (first + rest).splitlines(keepends=True)
    log.update(tuple(json.loads(line)) for line in lines if line.endswith("\n"))  # type: ignore[arg-type]


def assert_sound(directory: Path, log: dict[int, str]) -> int:
    """Assert that every listed step is restored bit for bit and no partial files remain. Return the newest step."""
    manager = CheckpointManager(directory, CheckpointConfig(max_to_keep=2))
    steps = manager.steps()
    assert {path.name for path in directory.iterdir()} == set(map(str, steps))
    assert 1 <= len(steps) <= 3
    for step in steps:
        result, state, _ = manager.restore(abstract(make_state(0, size=4096)), step=step)
        assert result == step and digest(state) == log[step]
    manager.close()
    return steps[-1]


@pytest.mark.slow
def test_saver_killed_at_random_times(tmp_path: Path):
    """Each process continues in the directory of the previous one."""
    rng, log, newest = random.Random(0), {}, 0
    for _ in range(5):
        run_and_kill(tmp_path, log, "any", delay=rng.uniform(0.15, 0.6))
        now = assert_sound(tmp_path, log)
        assert now > newest
        newest = now


@pytest.mark.parametrize(
    "moment",
    [
        "checksums._sha256",  # the arrays are committed, without checksums
        "checksums.sync_directory",  # the checksums are written, under the temporary name
        "Path.rename",  # everything is written, before the rename
        "os.rmdir",  # an old checkpoint is partly removed
    ],
)
def test_saver_killed_at_a_chosen_operation(tmp_path: Path, moment: str):
    log: dict[int, str] = {}
    run_and_kill(tmp_path, log, moment, delay=0)
    # The fourth save was killed: it exists only if it was renamed before.
    assert assert_sound(tmp_path, log) == (4 if moment == "os.rmdir" else 3)


def assert_full_disk_is_survived(directory: Path, saved: list[int], reason: str) -> None:
    """Save until the disk is full, and check the message, that no partial files remain, and the earlier checkpoints."""
    config = CheckpointConfig(max_to_keep=3)
    manager = CheckpointManager(directory, config)
    with pytest.raises(SafetyError) as refusal:
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
    """Mount a file system of 20 MiB."""
    return mount_disk(20)


def test_full_disk_keeps_earlier_checkpoints(small_disk: Path):
    """Checkpoints of 8 MiB: two fit, and the third does not before an old one is removed."""
    assert_full_disk_is_survived(small_disk / "checkpoints", [1, 2], "No space left on device")


def test_disk_that_is_too_small_is_refused_at_the_start(small_disk: Path):
    size = state_bytes(make_state(0, size=1 << 15))
    with pytest.raises(SafetyError, match="20,971,520 bytes are free"):
        require_free_space(small_disk, size, CheckpointConfig(max_to_keep=3))
    require_free_space(small_disk, size // 2, CheckpointConfig(max_to_keep=1))


def test_file_size_limit_keeps_earlier_checkpoints(tmp_path: Path):
    """The same without permission to mount: a limit of the operating system on the size of files."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        assert_full_disk_is_survived(tmp_path / "checkpoints", [], "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
