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


@pytest.fixture
def mount_image(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Return a function that mounts a file of the given size in MiB as a file system, until the end of the test."""
    if os.geteuid() != 0 or any(shutil.which(name) is None for name in ("mount", "mkfs.ext4", "fsfreeze")):
        pytest.skip("mounting an image needs root, mkfs.ext4 and fsfreeze")
    mounted = []

    def mount(mebibytes: int) -> Path:
        directory, image = tmp_path / "image", tmp_path / "image.ext4"
        directory.mkdir()
        with image.open("wb") as file:
            file.truncate(mebibytes << 20)
        subprocess.run(["mkfs.ext4", "-q", image], check=True)
        result = subprocess.run(["mount", "-o", "loop", image, directory], capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"cannot mount an image: {result.stderr.strip()}")
        mounted.append(directory)
        return directory

    yield mount
    for directory in mounted:
        subprocess.run(["umount", "--lazy", directory], check=True)


@pytest.fixture
def cover() -> Iterator[Callable[[Path], Callable[[], None]]]:
    """Return a function that covers a directory by a file system which never answers: one of FUSE, without the process
    that would serve it. Until the function that it returns is called, or the test ends, whatever opens a path below the
    directory waits."""
    if os.geteuid() != 0 or shutil.which("mount") is None or not Path("/dev/fuse").exists():
        pytest.skip("a file system that does not answer needs root and /dev/fuse")
    covered: dict[Path, int] = {}

    def uncover(directory: Path) -> None:
        os.close(covered.pop(directory))  # Those who wait get an error, and nobody else waits.
        subprocess.run(["umount", "--lazy", directory], check=True)

    def mount(directory: Path) -> Callable[[], None]:
        device = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0"
        command = ["mount", "-i", "-t", "fuse", "-o", options, "unanswered", directory]
        result = subprocess.run(command, pass_fds=[device], capture_output=True, text=True)
        if result.returncode:
            os.close(device)
            pytest.skip(f"cannot mount a file system of FUSE: {result.stderr.strip()}")
        covered[directory] = device
        return lambda: uncover(directory)

    yield mount
    for directory in list(covered):
        uncover(directory)


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
