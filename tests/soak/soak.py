"""Soak: random faults over one run of two processes, which must end as the undisturbed run: `make soak MINUTES=15`.

Each fault hits a start of the run at a random place: during a save or between two saves, after a random number of
saves. So early and late saves are hit. The service of a metric writer is out of order all the time. After the last
fault the run is completed, and its final arrays, its metrics and the rows of every step are compared with those of a
run that was not disturbed. Mounting file systems needs root.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from helpers.fault_runs import RECIPE, Workspace, children, logged, newest  # noqa: E402
from helpers.recorded_rows import recorded_rows  # noqa: E402
from helpers.saved_state import saved_state  # noqa: E402

from t5x_like.errors import EXIT_OK, EXIT_REFUSED, EXIT_RESUMABLE, RESTART_CODES  # noqa: E402

STEPS_PER_FAULT = 12
SAVE_EVERY = 4
SECONDS = 1200.0
"""Limit of one start."""


class Soak:
    """The run under faults, in a folder on a file system of its own, which can be filled and unmounted."""

    def __init__(self, root: Path, num_steps: int, seed: int):
        self.workspace = Workspace(root / "work")
        self.num_steps = num_steps
        self.random = random.Random(seed)
        self.volume, self.workdir = root / "volume", root / "run"
        for folder in (self.volume, self.workdir):
            folder.mkdir()
        _mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", self.volume)
        (self.volume / "run").mkdir()
        self.mount_run()
        self.recipes = RECIPE.with_name("multiprocess_recipe.py")
        prepared = self.workspace.start("prepare", f"{self.recipes}:encoder_decoder")
        assert prepared.wait() == EXIT_OK, prepared.communicate()[0]

    def mount_run(self) -> None:
        _mount("--bind", self.volume / "run", self.workdir)

    def close(self) -> None:
        for folder in (self.workdir, self.volume):
            subprocess.run(["umount", "-l", folder], capture_output=True)

    def start(self, workdir: Path, recipe: str) -> subprocess.Popen[str]:
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self.workspace.directory / "compiled")}
        variables = {**cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        launcher = ("-n", "2", "--devices-per-process", "2", "--max-restarts", "0", "--")
        command = (sys.executable, "-m", "t5x_like", "train", f"{self.recipes}:{recipe}", "--workdir", str(workdir))
        fields = {
            "sharding.data": 2,
            "training.num-train-steps": self.num_steps,
            "checkpoints.save-every-steps": SAVE_EVERY,
            "checkpoints.max-to-keep": 3,
            "monitoring.max-starts-without-progress": 1000,
            "timeouts.step": 20,
        }
        options = [text for name, value in fields.items() for text in (f"--{name}", str(value))]
        return self.workspace.start(
            *launcher, *command, *options, module="t5x_like.launching.local", variables=variables
        )

    def disturbed(self) -> subprocess.Popen[str]:
        return self.start(self.workdir, "broken_writer")

    def wait_for_a_place(self, process: subprocess.Popen[str]) -> str:
        """Wait for a random moment, and return what it is; the run may end before."""
        checkpoints = self.workdir / "checkpoints"
        saved = newest(self.workdir) if checkpoints.is_dir() and any(checkpoints.glob("[0-9]*")) else 0
        step = min(saved // SAVE_EVERY * SAVE_EVERY + SAVE_EVERY * self.random.randint(1, 4), self.num_steps)
        if self.random.random() < 0.5:
            _wait(lambda: _exists(checkpoints / f"{step}.saving") or _exists(checkpoints / str(step)), process)
            time.sleep(self.random.uniform(0, 0.1))
            return f"during the save of step {step}"
        _wait((checkpoints / str(step)).exists, process)
        time.sleep(self.random.uniform(0, 0.5))
        return f"after the save of step {step}"


def _exists(path: Path) -> bool:
    # Orbax writes to a name of its own first, which begins with that of the folder.
    return path.exists() or any(path.parent.glob(f"{path.name}.*"))


def _wait(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def _mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True)


def _signal(number: signal.Signals) -> Callable[[Soak, subprocess.Popen[str]], None]:
    def send(soak: Soak, process: subprocess.Popen[str]) -> None:
        with contextlib.suppress(OSError, IndexError):
            os.kill(soak.random.choice(children(process)), number)

    return send


def kill_all(soak: Soak, process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(OSError):
        for pid in children(process):
            os.kill(pid, signal.SIGKILL)


def fill_disk(soak: Soak, process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(OSError), (soak.volume / "filler").open("wb") as filler:
        while True:
            filler.write(bytes(1 << 16))
            filler.flush()


def drop_volume(soak: Soak, process: subprocess.Popen[str]) -> None:
    subprocess.run(["umount", "-l", soak.workdir], check=True)


def flip_bit(soak: Soak, process: subprocess.Popen[str]) -> None:
    """End the processes, and flip a bit of the newest checkpoint, if it is not the only one."""
    kill_all(soak, process)
    process.wait()
    checkpoints = soak.workdir / "checkpoints"
    steps = sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal())
    if len(steps) > 1:
        files = sorted(path for path in (checkpoints / str(steps[-1])).rglob("*") if path.is_file())
        file = soak.random.choice([path for path in files if path.stat().st_size])
        content = bytearray(file.read_bytes())
        content[soak.random.randrange(len(content))] ^= 1 << soak.random.randrange(8)
        file.write_bytes(content)


KILLED = (*RESTART_CODES, 128 + signal.SIGKILL)
# Fault -> function, and the exit codes that the launcher may have. A start that reaches the end first has 0.
FAULTS: dict[str, tuple[Callable[[Soak, subprocess.Popen[str]], None], tuple[int, ...]]] = {
    "SIGKILL of one process": (_signal(signal.SIGKILL), KILLED),
    "SIGKILL of both": (kill_all, KILLED),
    "SIGTERM of one": (_signal(signal.SIGTERM), (EXIT_RESUMABLE,)),
    "SIGSTOP of one": (_signal(signal.SIGSTOP), KILLED),
    "full disk": (fill_disk, (EXIT_REFUSED,)),
    "dropped volume": (drop_volume, (EXIT_REFUSED,)),
    "flipped bit": (flip_bit, KILLED),
}


def one_fault(soak: Soak, name: str) -> str:
    """Start the run, inject a fault, and repair its cause. Return where it hit and the exit code."""
    inject, codes = FAULTS[name]
    process = soak.disturbed()
    pids: list[int] = []
    _wait(lambda: len(pids.extend(children(process)) or pids) >= 2, process)  # type: ignore[func-returns-value]
    where = soak.wait_for_a_place(process)
    inject(soak, process)
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    (soak.volume / "filler").unlink(missing_ok=True)
    if not soak.workdir.is_mount():
        soak.mount_run()
    left = [pid for pid in pids if _is_alive(pid)]
    assert process.returncode in (*codes, EXIT_OK) and not left, (
        f"{name} {where}: {process.returncode} {left}\n{output}"
    )
    return f"{where}: exit code {process.returncode}"


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=3600)
    assert process.returncode == EXIT_OK, output


@contextlib.contextmanager
def opened(root: Path, num_steps: int, seed: int) -> Iterator[Soak]:
    soak = Soak(root, num_steps, seed)
    try:
        yield soak
    finally:
        soak.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=15, help="time after which no further fault is injected")
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as root,
        opened(Path(root), STEPS_PER_FAULT * options.faults, options.seed) as soak,
    ):
        undisturbed = soak.workspace.directory / "undisturbed"
        finish(soak.start(undisturbed, "encoder_decoder"))
        begun = time.monotonic()
        counts: collections.Counter[str] = collections.Counter()
        for number in range(options.faults):
            if time.monotonic() - begun > 60 * options.minutes:
                break
            name = [*FAULTS][number % len(FAULTS)]
            print(f"{time.monotonic() - begun:5.0f} s  {name} {one_fault(soak, name)}", flush=True)
            counts[name] += 1
        finish(soak.disturbed())
        seconds = time.monotonic() - begun
        expected, result = (saved_state(run, soak.num_steps) for run in (undisturbed, soak.workdir))
        assert result.keys() == expected.keys()
        different = [path for path in expected if result[path].tobytes() != expected[path].tobytes()]
        assert not different, different
        assert logged(soak.workdir) == logged(undisturbed)
        rows = recorded_rows(soak.workdir)
        assert rows == recorded_rows(undisturbed) and len(rows) == soak.num_steps
        print(
            json.dumps(
                {
                    "faults": sum(counts.values()),
                    "by kind": counts,
                    "seconds": round(seconds),
                    "steps": soak.num_steps,
                    "equal arrays": len(expected),
                    "equal records": len(logged(undisturbed)),
                    "equal rows": sum(map(len, rows.values())),
                }
            )
        )


if __name__ == "__main__":
    main()
