"""Runs that tests disturb, the undisturbed ones that they are compared with, and small file systems."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.fault_runs import LAST_STEP, RECIPE, Workspace, finish, logged
from helpers.recorded_rows import recorded_rows


@pytest.fixture
def mount_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Return a function that mounts a file system of the given size in MiB, with so many inodes, until
    the end of the test."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted = []

    def mount(mebibytes: int, inodes: int = 0) -> Path:
        directory = tmp_path / f"disk{len(mounted)}"
        directory.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m,nr_inodes={inodes}", "tmpfs", directory]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"cannot mount a small file system: {result.stderr.strip()}")
        mounted.append(directory)
        return directory

    yield mount
    for directory in mounted:
        subprocess.run(["umount", directory], check=True)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("runs"))
    finish(workspace.start("prepare", RECIPE))
    return workspace


@pytest.fixture(scope="session")
def uninterrupted(workspace: Workspace) -> Callable[[str], Path]:
    """Return a function from a recipe to the directory of its uninterrupted run."""
    done: dict[str, Path] = {}

    def run(recipe: str = "recipe") -> Path:
        if recipe not in done:
            done[recipe] = workspace.directory / f"uninterrupted_{recipe}"
            finish(workspace.train(done[recipe], recipe=recipe))
            assert [line["step"] for line in logged(done[recipe])] == list(range(3, LAST_STEP + 1, 3))
            rows = recorded_rows(done[recipe])
            # Each row once, in order; what each contains in an epoch is tested with the stream.
            assert [index for step in sorted(rows) for _, index, _ in rows[step]] == list(range(8 * LAST_STEP))
            assert sorted(rows) == list(range(1, LAST_STEP + 1))
        return done[recipe]

    return run


@pytest.fixture(scope="session")
def killed(workspace: Workspace) -> Path:
    """Return the directory of a killed run with at least the checkpoints 8 and 16."""
    workdir = workspace.directory / "killed"
    workspace.train_and_kill(workdir, step=16)
    return workdir


@pytest.fixture
def killed_copy(killed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(killed, tmp_path / "killed"))
