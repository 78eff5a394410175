"""Soak: random faults over one run of two processes, which must end as the undisturbed run: `make soak MINUTES=75`.

Each fault hits a start of the run at a random moment of one phase: while the processes start and compile, at the
restore, between two steps, during a save, after a save, or in an evaluation. Each kind of fault meets each phase, and
the saves that are hit are spread over the whole run. The service of a metric writer is out of order all the time. After
the last fault the run is completed, and its final arrays, its metrics and evaluations, and the rows of every step are
compared with those of a run that was not disturbed. Mounting file systems needs root.
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
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from helpers.fault_runs import RECIPE, Workspace, children, logged, records_of  # noqa: E402
from helpers.recorded_rows import recorded_rows  # noqa: E402
from helpers.saved_state import saved_state  # noqa: E402

from t5x_like.errors import EXIT_OK, EXIT_REFUSED, EXIT_RESUMABLE, RESTART_CODES  # noqa: E402

STEPS_PER_FAULT = 5
SAVE_EVERY = 4
EVALUATE_EVERY = 12
SECONDS = 600.0
"""Limit of one start, from the fault on."""
FIELDS = {
    "sharding.data": 2,
    "checkpoints.save-every-steps": SAVE_EVERY,
    "checkpoints.max-to-keep": 3,
    "evaluation.every-steps": EVALUATE_EVERY,
    # Each start would trace and compile the replayed step, of which the tests of replays are enough.
    "monitoring.determinism-check-every": None,
    "monitoring.max-starts-without-progress": 1000,
    # A stopped process is noticed by these, on a machine that may have much other work.
    "timeouts.rendezvous": 90,
    "timeouts.start": 120,
    "timeouts.restore": 90,
    "timeouts.compile": 180,
    "timeouts.step": 20,
    "timeouts.data": 60,
    "timeouts.save": 60,
    "timeouts.evaluation": 90,
}
# jax reads its cache of programs on CPUs in process 0 only, since the keys of the others differ. So compile fast.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


class Start:
    """Launcher of the two processes, whose output is read while they run."""

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process
        self.pids: list[int] = []
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)

    @property
    def output(self) -> str:
        return "".join(self._lines)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition, or for the end of the processes, which may come first."""
        deadline = time.monotonic() + SECONDS
        while not condition() and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)

    def wait_for_text(self, text: str) -> None:
        self.wait(lambda: any(text in line for line in self._lines))

    def wait_for_processes(self) -> None:
        def found() -> bool:
            self.pids = children(self.process)
            return len(self.pids) >= 2

        self.wait(found)

    def finish(self, seconds: float) -> int:
        try:
            code = self.process.wait(timeout=seconds)
            self._reader.join(timeout=60)
        finally:
            self.process.kill()
        return code


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
        prepared = self.workspace.start("prepare", f"{self.recipes}:decoder")
        assert prepared.wait() == EXIT_OK, prepared.communicate()[0]

    def mount_run(self) -> None:
        _mount("--bind", self.volume / "run", self.workdir)

    def close(self) -> None:
        for folder in (self.workdir, self.volume):
            subprocess.run(["umount", "-l", folder], capture_output=True)

    def start(self, workdir: Path, recipe: str) -> Start:
        variables = {
            "JAX_COMPILATION_CACHE_DIR": str(self.workspace.directory / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": XLA_FLAGS,
        }
        launcher = ("-n", "2", "--devices-per-process", "1", "--max-restarts", "0", "--")
        command = (sys.executable, "-m", "t5x_like", "train", f"{self.recipes}:{recipe}", "--workdir", str(workdir))
        fields = {**FIELDS, "training.num-train-steps": self.num_steps}
        options = [text for name, value in fields.items() for text in (f"--{name}", str(value))]
        return Start(
            self.workspace.start(*launcher, *command, *options, module="t5x_like.launching.local", variables=variables)
        )

    def disturbed(self) -> Start:
        return self.start(self.workdir, "broken_writer")

    def saved_step(self) -> int:
        names = (path.name for path in (self.workdir / "checkpoints").glob("*"))
        return max((int(name) for name in names if name.isdecimal()), default=0)


def at_start(soak: Soak, start: Start, progress: float) -> str:
    start.wait_for_processes()
    time.sleep(seconds := soak.random.uniform(0, 20))
    return f"{seconds:.0f} s after the start"


def at_restore(soak: Soak, start: Start, progress: float) -> str:
    start.wait_for_text("run directory")
    time.sleep(soak.random.uniform(0, 1))
    return f"after the restore of step {soak.saved_step()}"


def at_step(soak: Soak, start: Start, progress: float) -> str:
    # A process that was stopped has saved at any step.
    step = min(soak.saved_step() + soak.random.randint(1, 9), soak.num_steps)
    start.wait_for_text(f"step {step}/")
    time.sleep(soak.random.uniform(0, 0.1))
    return f"after step {step}"


def at_save(soak: Soak, start: Start, progress: float) -> str:
    path = _target(soak, progress)
    start.wait_for_text("run directory")  # What a failed save has left is removed then.
    start.wait(lambda: _exists(path.with_name(f"{path.name}.saving")) or _exists(path))
    time.sleep(soak.random.uniform(0, 0.1))
    return f"during the save of step {path.name}"


def after_save(soak: Soak, start: Start, progress: float) -> str:
    path = _target(soak, progress)
    start.wait(path.exists)
    time.sleep(soak.random.uniform(0, 0.5))
    return f"after the save of step {path.name}"


def at_evaluation(soak: Soak, start: Start, progress: float) -> str:
    start.wait_for_text("evaluating step")
    time.sleep(soak.random.uniform(0, 1))
    return f"in the first evaluation after step {soak.saved_step()}"


def _target(soak: Soak, progress: float) -> Path:
    """Return the path of the checkpoint that is saved when so much of the run is done, or of the next one."""
    due = round(progress * soak.num_steps / SAVE_EVERY) * SAVE_EVERY
    step = min(max(soak.saved_step() // SAVE_EVERY * SAVE_EVERY + SAVE_EVERY, due), soak.num_steps)
    return soak.workdir / "checkpoints" / str(step)


def _exists(path: Path) -> bool:
    # Orbax writes to a name of its own first, which begins with that of the folder.
    return path.exists() or any(path.parent.glob(f"{path.name}.*"))


def _mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True)


def _signal(number: signal.Signals) -> Callable[[Soak, Start], None]:
    def send(soak: Soak, start: Start) -> None:
        with contextlib.suppress(OSError, IndexError):
            os.kill(soak.random.choice(children(start.process)), number)

    return send


def kill_all(soak: Soak, start: Start) -> None:
    with contextlib.suppress(OSError):
        for pid in children(start.process):
            os.kill(pid, signal.SIGKILL)


def fill_disk(soak: Soak, start: Start) -> None:
    with contextlib.suppress(OSError), (soak.volume / "filler").open("wb") as filler:
        while True:
            filler.write(bytes(1 << 16))
            filler.flush()


def drop_volume(soak: Soak, start: Start) -> None:
    subprocess.run(["umount", "-l", soak.workdir], check=True)


def flip_bit(soak: Soak, start: Start) -> None:
    """End the processes, and flip a bit of the newest checkpoint, if it is not the only one."""
    kill_all(soak, start)
    start.process.wait()
    checkpoints = soak.workdir / "checkpoints"
    steps = sorted(int(path.name) for path in checkpoints.glob("*") if path.name.isdecimal())
    if len(steps) > 1:
        files = sorted(path for path in (checkpoints / str(steps[-1])).rglob("*") if path.is_file())
        file = soak.random.choice([path for path in files if path.stat().st_size])
        content = bytearray(file.read_bytes())
        content[soak.random.randrange(len(content))] ^= 1 << soak.random.randrange(8)
        file.write_bytes(content)


KILLED = (*RESTART_CODES, 128 + signal.SIGKILL)
# Fault -> function, and the exit codes that the launcher may have.
FAULTS: dict[str, tuple[Callable[[Soak, Start], None], tuple[int, ...]]] = {
    "SIGKILL of one process": (_signal(signal.SIGKILL), KILLED),
    "SIGKILL of both": (kill_all, KILLED),
    "SIGTERM of one": (_signal(signal.SIGTERM), (EXIT_RESUMABLE,)),
    "SIGSTOP of one": (_signal(signal.SIGSTOP), KILLED),
    "full disk": (fill_disk, (EXIT_REFUSED,)),
    "dropped volume": (drop_volume, (EXIT_REFUSED,)),
    "flipped bit": (flip_bit, KILLED),
}
# The numbers of faults and of phases have no common factor, so that each fault meets each phase.
PHASES = (at_save, at_start, after_save, at_step, at_evaluation, at_restore)


def one_fault(soak: Soak, number: int, progress: float) -> tuple[str, str]:
    """Start the run, inject a fault, and repair its cause. Return its name, and where it hit and the exit code.

    A fault in the last moments of the run may come too late: then it is counted as "too late".
    """
    name, phase = [*FAULTS][number % len(FAULTS)], PHASES[number % len(PHASES)]
    if name == "dropped volume" and phase is at_start:
        phase = at_save  # Without its volume the folder looks like that of a new run.
    inject, codes = FAULTS[name]
    if phase is at_start and name.startswith("SIGTERM"):
        codes = KILLED  # Before Python runs, a signal ends the process.
    start = soak.disturbed()
    start.wait_for_processes()
    where = phase(soak, start, progress)
    inject(soak, start)
    code = start.finish(SECONDS)
    (soak.volume / "filler").unlink(missing_ok=True)
    if not soak.workdir.is_mount():
        soak.mount_run()
    left = [pid for pid in start.pids if _is_alive(pid)]
    assert code in (*codes, EXIT_OK) and not left, f"{name} {where}: {code} {left}\n{start.output}"
    assert "Traceback" not in start.output or code in KILLED, f"{name} {where}: {code}\n{start.output}"
    if code == EXIT_OK:
        assert soak.saved_step() == soak.num_steps, start.output
        name = "too late"
    return name, f"{where}: exit code {code}"


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def complete(start: Start) -> None:
    code = start.finish(3600)
    assert code == EXIT_OK, start.output


@contextlib.contextmanager
def opened(root: Path, num_steps: int, seed: int) -> Iterator[Soak]:
    soak = Soak(root, num_steps, seed)
    try:
        yield soak
    finally:
        soak.close()


@contextlib.contextmanager
def folder(root: Path | None) -> Iterator[Path]:
    if root is None:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
    else:
        root.mkdir(parents=True)
        yield root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=75, help="time after which no further fault is injected")
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, help="new folder for the runs, which is kept")
    options = parser.parse_args()
    num_steps = STEPS_PER_FAULT * options.faults
    with folder(options.root) as root, opened(root, num_steps, options.seed) as soak:
        undisturbed = soak.workspace.directory / "undisturbed"
        complete(soak.start(undisturbed, "decoder"))
        begun = time.monotonic()
        counts: collections.Counter[str] = collections.Counter()
        for number in range(options.faults):
            if time.monotonic() - begun > 60 * options.minutes:
                break
            name, where = one_fault(soak, number, (number + 1) / options.faults)
            print(f"{time.monotonic() - begun:5.0f} s  {number + 1} {name} {where}", flush=True)
            counts[name] += 1
        complete(soak.disturbed())
        seconds = time.monotonic() - begun
        expected, result = (saved_state(run, soak.num_steps) for run in (undisturbed, soak.workdir))
        assert result.keys() == expected.keys()
        different = [path for path in expected if result[path].tobytes() != expected[path].tobytes()]
        assert not different, different
        assert logged(soak.workdir) == logged(undisturbed)
        evaluations = [records_of(run / "evaluations.jsonl") for run in (undisturbed, soak.workdir)]
        assert evaluations[0] == evaluations[1], evaluations
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
                    "equal evaluations": len(evaluations[0]),
                    "equal rows": sum(map(len, rows.values())),
                }
            )
        )


if __name__ == "__main__":
    main()
