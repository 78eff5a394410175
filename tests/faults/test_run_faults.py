"""Whole runs under faults, through the command line: whatever happened, the same command ends where the undisturbed run
ends, bit for bit, or refuses with the reason."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
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

from t5x_like.checkpoints import trees
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config import EXIT_OK, EXIT_REFUSED, EXIT_RESUMABLE, CheckpointConfig

REPOSITORY = Path(__file__).parents[2]
RECIPE = Path(__file__).with_name("recipe.py")
LAST_STEP = 60
TIMINGS = {"seconds_per_step", "tokens_per_second", "data_wait_fraction", "mfu", "goodput"}


class Place:
    """A directory with a corpus and its prepared store, where runs are started."""

    def __init__(self, directory: Path):
        self.directory = directory
        rng = random.Random(0)
        words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(60)]
        (directory / "texts").mkdir(parents=True)
        for number in range(20):
            (directory / "texts" / f"{number}.txt").write_text(" ".join(rng.choices(words, k=400)))

    def start(self, *arguments: str | Path, compile_anew: bool = False) -> subprocess.Popen[str]:
        """Starts `t5x-like`. Compiled programs are kept for the next process, unless it is to compile its own."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.directory / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        if compile_anew:
            del environment["JAX_COMPILATION_CACHE_DIR"]
        return subprocess.Popen(
            [sys.executable, "-m", "t5x_like", *map(str, arguments)],
            cwd=self.directory,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def train(
        self, workdir: Path, *overrides: str, recipe: str = "recipe", compile_anew: bool = False
    ) -> subprocess.Popen[str]:
        command = ("train", f"{RECIPE}:{recipe}", "--workdir", workdir, *overrides)
        return self.start(*command, compile_anew=compile_anew)

    def train_and_kill(self, workdir: Path, step: int, recipe: str = "recipe") -> None:
        """Ends a run with SIGKILL as soon as the checkpoint of `step` is there."""
        process = self.train(workdir, recipe=recipe)
        wait_for(workdir / "checkpoints" / str(step), process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL


def finish(process: subprocess.Popen[str], code: int = EXIT_OK) -> str:
    """Waits for the end, checks the exit code, and returns the output in one line."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return re.sub(r"\s+", " ", output)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"{path} did not appear:\n{process.communicate()[0]}")
        time.sleep(0.002)


def saved_arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint by path: parameters, optimizer, step and random key."""
    record = json.loads((workdir / "checkpoints" / str(step) / "meta.json").read_text())
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaves = {}
    for path, description in record["state"].items():
        dtype, shape = description.removesuffix("]").split("[")
        dimensions = tuple(int(size) for size in shape.split(",") if size)
        leaves[path] = jax.ShapeDtypeStruct(dimensions, jnp.dtype(dtype), sharding=device)
    manager = CheckpointManager(workdir / "checkpoints", CheckpointConfig(), read_only=True)
    _, state, _ = manager.restore(trees.nested(leaves), step=step)
    manager.close()
    return {path: np.asarray(leaf) for path, leaf in trees.by_path(state).items()}


def logged(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def assert_same_end(workdir: Path, undisturbed: Path) -> None:
    expected, found = saved_arrays(undisturbed, LAST_STEP), saved_arrays(workdir, LAST_STEP)
    assert found.keys() == expected.keys()
    assert any(path.startswith("opt_state/") for path in found) and any(path.startswith("params/") for path in found)
    different = [path for path in expected if found[path].tobytes() != expected[path].tobytes()]
    assert not different
    assert logged(workdir) == logged(undisturbed)
    assert json.loads((workdir / "exit.json").read_text())["code"] == EXIT_OK


def flip_one_bit(step_directory: Path) -> Path:
    file = max((p for p in (step_directory / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("runs"))
    finish(place.start("prepare", RECIPE))
    return place


@pytest.fixture(scope="module")
def undisturbed(place: Place) -> Callable[[str], Path]:
    """The run directory of a recipe that nothing happened to."""
    done: dict[str, Path] = {}

    def run(recipe: str = "recipe") -> Path:
        if recipe not in done:
            done[recipe] = place.directory / f"undisturbed_{recipe}"
            finish(place.train(done[recipe], recipe=recipe))
            assert [line["step"] for line in logged(done[recipe])] == list(range(3, LAST_STEP + 1, 3))
        return done[recipe]

    return run


@pytest.fixture(scope="module")
def killed(place: Place) -> Path:
    """A run directory that a SIGKILL left with at least the checkpoints 8 and 16."""
    workdir = place.directory / "killed"
    place.train_and_kill(workdir, step=16)
    return workdir


@pytest.fixture
def killed_copy(killed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(killed, tmp_path / "killed"))


def newest(workdir: Path) -> int:
    return max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


@pytest.mark.parametrize("recipe", ["recipe", pytest.param("prefix_lm", marks=pytest.mark.slow)])
def test_killed_run_ends_like_the_undisturbed(place: Place, undisturbed: Callable[[str], Path], recipe: str):
    """Two kills; the last process compiles its own program."""
    workdir = place.directory / f"twice_killed_{recipe}"
    place.train_and_kill(workdir, step=8, recipe=recipe)
    place.train_and_kill(workdir, step=newest(workdir) // 8 * 8 + 16, recipe=recipe)
    resumed_from = newest(workdir)
    assert resumed_from < LAST_STEP
    output = finish(place.train(workdir, recipe=recipe, compile_anew=True))
    assert f"step {resumed_from}" in output
    assert_same_end(workdir, undisturbed(recipe))


def test_sigterm_saves_and_the_same_command_resumes(place: Place, undisturbed: Callable[[str], Path]):
    workdir = place.directory / "terminated"
    process = place.train(workdir)
    wait_for(workdir / "checkpoints" / "8", process)
    process.send_signal(signal.SIGTERM)
    finish(process, code=EXIT_RESUMABLE)
    left = json.loads((workdir / "exit.json").read_text())
    assert left["code"] == EXIT_RESUMABLE and "SIGTERM" in left["reason"]
    assert 8 <= left["step"] < LAST_STEP and newest(workdir) == left["step"]
    assert saved_arrays(workdir, left["step"])["step"] == left["step"]
    finish(place.train(workdir))
    assert_same_end(workdir, undisturbed("recipe"))


def test_sigterm_before_the_first_step(place: Place):
    """While the program is being compiled: nothing is half done, and the exit code says that it can go on."""
    workdir = place.directory / "terminated_early"
    process = place.train(workdir, compile_anew=True)
    wait_for(workdir / "config.json", process)
    process.send_signal(signal.SIGTERM)
    finish(process, code=EXIT_RESUMABLE)
    assert json.loads((workdir / "exit.json").read_text())["code"] == EXIT_RESUMABLE
    assert not logged(workdir)


def test_damaged_newest_checkpoint_falls_back(place: Place, killed_copy: Path, undisturbed: Callable[[str], Path]):
    step = newest(killed_copy)
    file = flip_one_bit(killed_copy / "checkpoints" / str(step))
    output = finish(place.train(killed_copy))
    assert str(file.relative_to(killed_copy / "checkpoints" / str(step))) in output
    assert f"Restoring step {step - 8} instead: 8 steps are lost" in output
    assert_same_end(killed_copy, undisturbed("recipe"))


def test_no_intact_checkpoint_is_refused(place: Place, killed_copy: Path):
    checkpoints = killed_copy / "checkpoints"
    steps = {path.name for path in checkpoints.iterdir() if path.name.isdecimal()}
    for step in steps:
        flip_one_bit(checkpoints / step)
    output = finish(place.train(killed_copy), code=EXIT_REFUSED)
    assert "no intact checkpoint is left" in output and "Traceback" not in output
    assert {path.name for path in checkpoints.iterdir() if path.name.isdecimal()} == steps
    assert json.loads((killed_copy / "exit.json").read_text())["code"] == EXIT_REFUSED


def test_another_configuration_is_refused_with_the_difference(place: Place, killed_copy: Path):
    before = (killed_copy / "config.json").read_text()
    overrides = ("--training.schedule.learning-rate", "0.004", "--model.dtype", "bfloat16")
    output = finish(place.train(killed_copy, *overrides), code=EXIT_REFUSED)
    assert "training.schedule.learning_rate: 0.003 in the run, 0.004 now" in output
    assert "model.dtype: 'float32' in the run, 'bfloat16' now" in output
    assert "batch_size" not in output and "Traceback" not in output
    assert (killed_copy / "config.json").read_text() == before


def test_other_data_is_refused(place: Place, killed_copy: Path, tmp_path: Path):
    """The same configuration, but a text has changed since."""
    other = Place(tmp_path / "other")
    (other.directory / "texts" / "0.txt").write_text("another text\n" * 50)
    finish(other.start("prepare", RECIPE))
    output = finish(other.train(killed_copy), code=EXIT_REFUSED)
    assert "fingerprint" in output and "Traceback" not in output


def test_finished_run_is_left_alone(place: Place, undisturbed: Callable[[str], Path]):
    workdir = undisturbed("recipe")
    before = (workdir / "metrics.jsonl").read_bytes(), newest(workdir)
    output = finish(place.train(workdir))
    assert "nothing to train" in output
    assert ((workdir / "metrics.jsonl").read_bytes(), newest(workdir)) == before


@pytest.fixture
def small_disk(mount_disk: Callable[[int], Path]) -> Path:
    """A file system of 12 MiB: enough for the checkpoints of this run."""
    return mount_disk(12)


def test_disk_that_fills_up(place: Place, small_disk: Path, tmp_path: Path, undisturbed: Callable[[str], Path]):
    """It is refused at the start; when it happens later, the run ends with the facts and goes on once there is room."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "checkpoints").symlink_to(small_disk)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(8 << 20))
    output = finish(place.train(workdir), code=EXIT_REFUSED)
    assert "no room for the checkpoints" in output and "Traceback" not in output
    filler.unlink()

    process = place.train(workdir)
    wait_for(small_disk / "8", process)
    with filler.open("wb") as stream:
        try:
            while True:
                stream.write(bytes(1 << 16))
                stream.flush()
        except OSError:
            pass
    output = finish(process, code=EXIT_REFUSED)
    # TensorStore's threads print warnings of their own, before our message and sometimes after it.
    last = output[output.rindex("t5x-like: ") :]
    assert "No space left on device" in last and "run the same command again." in last
    assert re.search(r"untouched: \[8(, \d+)*\]", last)
    kept = [path.name for path in small_disk.iterdir() if path.name != "filler"]
    assert kept and all(name.isdecimal() for name in kept)
    filler.unlink()
    finish(place.train(workdir))
    assert_same_end(workdir, undisturbed("recipe"))
