"""Small runs by the command line, which tests disturb and compare with an undisturbed one."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from helpers.recorded_rows import recorded_rows
from helpers.saved_state import saved_state

from t5x_like.errors import EXIT_OK

REPOSITORY = Path(__file__).parents[2]
RECIPE = Path(__file__).with_name("fault_recipe.py")
LAST_STEP = 60
TIMINGS = ("crc32", "step_time_s", "tokens_per_second", "data_wait_fraction", "mfu", "goodput", "lost_time/")


class Workspace:
    """Directory with a corpus and its prepared store, in which runs are started."""

    def __init__(self, directory: Path):
        self.directory = directory
        rng = random.Random(0)
        words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(60)]
        (directory / "texts").mkdir(parents=True)
        for number in range(12):
            (directory / "texts" / f"{number}.txt").write_text(" ".join(rng.choices(words, k=400)))

    def start(
        self,
        *arguments: str | Path,
        module: str = "t5x_like",
        variables: Mapping[str, str] = MappingProxyType({}),
        prefix: tuple[str, ...] = (),
    ) -> subprocess.Popen[str]:
        """Start `t5x-like`, or another module, with further environment variables, through the command `prefix`."""
        path = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
        environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **variables}
        return subprocess.Popen(
            [*prefix, sys.executable, "-m", module, *map(str, arguments)],
            cwd=self.directory,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def train(
        self, workdir: Path, *overrides: str, recipe: str = "recipe", compile_anew: bool = False, **program: Any
    ) -> subprocess.Popen[str]:
        """Start a run. Compiled programs are kept for later processes, unless `compile_anew`.

        `program` has the keywords of `start`.
        """
        cache = ("enabled", "False") if compile_anew else ("directory", self.directory / "compiled")
        options = (f"--compilation-cache.{cache[0]}", cache[1], *overrides)
        return self.start("train", f"{RECIPE}:{recipe}", "--workdir", workdir, *options, **program)

    def launch(self, workdir: Path, *overrides: str, max_restarts: int = 3) -> subprocess.Popen[str]:
        """Start a run of one process by `launch local`."""
        options = ("-n", "1", "--workdir", workdir, "--execute", "--max-restarts", str(max_restarts))
        train = ("--", "--compilation-cache.directory", self.directory / "compiled", *overrides)
        return self.start("launch", "local", f"{RECIPE}:recipe", *options, *train)

    def train_and_kill(self, workdir: Path, step: int, recipe: str = "recipe") -> None:
        """Start a run, and kill it as soon as the checkpoint of `step` exists."""
        process = self.train(workdir, recipe=recipe)
        wait_for(workdir / "checkpoints" / str(step), process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL


def finish(process: subprocess.Popen[str], code: int = EXIT_OK, seconds: float = 600) -> str:
    """Wait for the end, check the exit code, and return the output as one line."""
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == code, output
    return re.sub(r"\s+", " ", output)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"{path} did not appear:\n{process.communicate()[0]}")
        time.sleep(0.002)


def fill(directory: Path, left: int = 0) -> Path:
    """Fill a file system until so many bytes are left; return the file that does so."""
    filler = directory / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(1 << 16))
    os.truncate(filler, max(filler.stat().st_size - left, 0))
    return filler


def logged(workdir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without the entries that depend on time."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(TIMINGS)} for line in lines]


def assert_same_end(workdir: Path, uninterrupted: Path) -> None:
    expected, result = saved_state(uninterrupted, LAST_STEP), saved_state(workdir, LAST_STEP)
    assert result.keys() == expected.keys()
    assert any(path.startswith("opt_state/") for path in result) and any(path.startswith("params/") for path in result)
    different = [path for path in expected if result[path].tobytes() != expected[path].tobytes()]
    assert not different
    assert logged(workdir) == logged(uninterrupted)
    assert recorded_rows(workdir) == recorded_rows(uninterrupted)
    assert json.loads((workdir / "exit.json").read_text())["code"] == EXIT_OK


def newest(workdir: Path) -> int:
    return max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


def records_of(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def children(process: subprocess.Popen[str]) -> list[int]:
    """Return the ids of the processes that a launcher has started, in order."""
    pids: list[str] = []
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        # A thread of the launcher can end meanwhile.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            pids += (task / "children").read_text().split()
    return sorted(map(int, pids))
