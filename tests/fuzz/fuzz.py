"""Fuzzing of every reader of files that may come from others: `make fuzz FUZZ_SECONDS=60`.

A process reads randomly changed files of each kind of `helpers.foreign_files` for some seconds, in turns, until each
had its time or `--inputs` were read in all: kinds that are read fast get the most. Every input must be read or refused
by a `UserError`. Another exception, the end of the process by a signal, more than 10 seconds of processor time for one
input (or two minutes without an end), and 2 GiB of memory more than for valid files are findings: the changed file is
kept under the number of the input, which makes it again with the same seed, and the exit code is 1. What was found
belongs into `FOUND` of `unit/test_foreign_files.py`, as a small change of a valid file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from helpers.foreign_files import KINDS  # noqa: E402
from helpers.mutations import changed, files_of, read  # noqa: E402

HANG_CPU_SECONDS = 10.0
HANG_SECONDS = 120.0
START_SECONDS = 600.0
TURN_SECONDS = 10.0
"""Longest time of a turn of a kind."""
MAX_GROWTH = 2048
"""MiB of resident memory above that after the valid files were read."""
MAX_ADDRESSES = 16 * 2**30
"""Bytes of addresses above those, which also limits what is allocated and not touched."""
MAX_FINDINGS = 10
"""Findings after which a kind is given up: more would be of the same kinds."""
_TICKS = os.sysconf("SC_CLK_TCK")


class Progress:
    """What the child process is at, in shared memory.

    Attributes:
      counts: Number of the next input of each kind.
      state: Index of the kind, the time since when its input is read (0: the valid files are read), the processor time
        of the process then, and the seconds that were left of its turn.
    """

    def __init__(self, context: Any, kinds: int) -> None:
        self.counts = context.Array("q", kinds, lock=False)
        self.state = context.Array("d", 4, lock=False)


def run_child(names: list[str], seconds: list[float], found: Path, seed: int, progress: Progress) -> None:
    """Read inputs of each kind for its number of seconds; exit code 1 after an exception, whose input is kept."""
    logging.disable(logging.CRITICAL)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    root = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        for index, name in enumerate(names):
            if seconds[index] > 0:
                folder = root / str(index)
                folder.mkdir()
                _read_kind(index, name, seconds[index], folder, found, seed, progress)
                shutil.rmtree(folder)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    os._exit(0)


def _read_kind(index: int, name: str, seconds: float, folder: Path, found: Path, seed: int, progress: Progress) -> None:
    progress.state[:] = (index, 0.0, 0.0, seconds)
    kind = KINDS[name]
    kind.make(folder)
    kind.read(folder)
    files = files_of(folder)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MAX_ADDRESSES, resource.RLIM_INFINITY))
    Path("/proc/self/clear_refs").write_text("5")  # The peak of the resident memory begins anew.
    number, previous = progress.counts[index], ""
    begun = time.monotonic()
    deadline = begun + seconds
    while (now := time.monotonic()) < deadline:
        progress.counts[index] = number
        progress.state[:] = (index, now, time.process_time(), deadline - now)
        file, data = changed(files, Random(f"{seed} {name} {number}"))
        if previous and previous != file:
            _write(folder / previous, files[previous])
        _write(folder / file, data)
        previous = file
        try:
            read(kind, folder)
        except BaseException:
            keep(found, name, number, file, data, traceback.format_exc())
            os._exit(1)
        number += 1
    progress.counts[index] = number


def _write(path: Path, data: bytes) -> None:
    # Without the buffers of Python's files, which cost more than the reading of some kinds.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    finally:
        os.close(descriptor)


def keep(found: Path, name: str, number: int, file: str, data: bytes, reason: str) -> None:
    folder = folder_of(found, name, number)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file.replace("/", "__")).write_bytes(data)
    (folder / "reason.txt").write_text(reason)


def folder_of(found: Path, name: str, number: int) -> Path:
    return found / f"{name.replace('/', ' ')} {number}"


class Fuzz:
    """State of a session.

    Args:
      names: Names of the kinds.

    Attributes:
      findings: Findings by kind.
      growth: By how many MiB the resident memory grew at most, by kind.
      seconds: Time that was spent by kind.
    """

    def __init__(self, names: list[str], seed: int, found: Path, first: int):
        self.names, self._seed, self._found = names, seed, found
        # TensorStore does not survive a fork.
        self._context = multiprocessing.get_context("spawn")
        self._progress = Progress(self._context, len(names))
        self._first = first
        self._progress.counts[:] = [first] * len(names)
        self.findings: dict[str, list[str]] = {name: [] for name in names}
        self.growth, self.seconds = dict.fromkeys(names, 0), dict.fromkeys(names, 0.0)

    @property
    def inputs(self) -> dict[str, int]:
        return {name: count - self._first for name, count in zip(self.names, self._progress.counts, strict=True)}

    def turn(self, seconds: float) -> None:
        """Read inputs of each kind for this number of seconds."""
        left = [0.0 if len(self.findings[name]) >= MAX_FINDINGS else seconds for name in self.names]
        while any(left):
            self._progress.state[:] = (0.0, 0.0, 0.0, 0.0)
            process = self._context.Process(
                target=run_child, args=(self.names, left, self._found, self._seed, self._progress)
            )
            process.start()
            try:
                reason = self._watch(process)
            finally:
                process.kill()
                process.join()
            index, since, _, rest = self._progress.state
            name = self.names[int(index)]
            if process.exitcode == 0:
                self._count_time(left, len(left), 0.0)
                return
            if since == 0.0:
                self.findings[name].append(f"the valid files: {reason or process.exitcode}")
                self._count_time(left, int(index), 0.0)
                left[int(index)] = 0.0
                continue
            self._record(name, process.exitcode, reason)
            self._count_time(left, int(index), rest)
            if len(self.findings[name]) >= MAX_FINDINGS:
                left[int(index)] = 0.0

    def _count_time(self, left: list[float], index: int, rest: float) -> None:
        """Count the time of the kinds before `index`, which have ended their turn, and of this one without the rest."""
        for number, name in enumerate(self.names[: index + 1]):
            kept = rest if number == index else 0.0
            self.seconds[name] += left[number] - kept
            left[number] = kept

    def _watch(self, process: Any) -> str:
        """Wait for the end of the child process, and return why it was killed, if it was."""
        begun, current, at_start = time.monotonic(), -1.0, 0
        while process.is_alive():
            process.join(0.2)
            index, since, cpu_before, _ = self._progress.state
            reason = ""
            if since == 0.0:
                begun = time.monotonic() if index != current else begun
                reason = "not read in time" if time.monotonic() - begun > START_SECONDS else ""
                current, at_start = index, 0
            elif (found := _usage(process.pid)) is not None:
                resident, cpu = found
                at_start = at_start or resident
                name = self.names[int(index)]
                self.growth[name] = max(self.growth[name], resident - at_start)
                begun = time.monotonic()
                if cpu - cpu_before > HANG_CPU_SECONDS or time.monotonic() - since > HANG_SECONDS:
                    reason = f"no end after {cpu - cpu_before:.0f} seconds of processor time"
                if resident - at_start > MAX_GROWTH:
                    reason = f"{resident - at_start} MiB"
            if reason:
                process.kill()
                process.join()
                return reason
        return ""

    def _record(self, name: str, code: int, reason: str) -> None:
        number = self._progress.counts[self.names.index(name)]
        if code < 0:
            reason = reason or signal.Signals(-code).name
            with tempfile.TemporaryDirectory() as root:
                KINDS[name].make(Path(root))
                file, data = changed(files_of(Path(root)), Random(f"{self._seed} {name} {number}"))
            keep(self._found, name, number, file, data, reason)
        kept = folder_of(self._found, name, number) / "reason.txt"
        # An exception outside the reader, such as one for lack of memory, leaves no input.
        text = kept.read_text().splitlines()[-1] if kept.is_file() else f"no input, exit code {code}"
        self.findings[name].append(f"input {number}: {text}")
        self._progress.counts[self.names.index(name)] = number + 1
        self.growth[name] = min(self.growth[name], MAX_GROWTH)


def _usage(pid: int | None) -> tuple[int, float] | None:
    """Return the peak of the resident memory in MiB and the processor time of a process; None if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    except OSError:
        return None
    resident = next((int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM")), 0)
    return resident, sum(map(int, times)) / _TICKS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="time for each kind")
    parser.add_argument("--inputs", type=int, default=0, help="go on until this number was read in all")
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--found", type=Path, default=Path("build/fuzz"), help="folder for what is found")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    options = parser.parse_args()
    fuzz, begun, spent = Fuzz(options.kinds, options.seed, options.found, options.first), time.monotonic(), 0.0
    found = 0
    # Ctrl-C ends the session with what was read until then.
    with contextlib.suppress(KeyboardInterrupt):
        while spent < options.seconds or sum(fuzz.inputs.values()) < options.inputs:
            turn = min(TURN_SECONDS, options.seconds)
            fuzz.turn(turn)
            spent += turn
            found = sum(map(len, fuzz.findings.values()))
            passed = time.monotonic() - begun
            print(f"{passed:.0f} s  {sum(fuzz.inputs.values()):,} inputs, {found} findings", flush=True)
            if all(len(findings) >= MAX_FINDINGS for findings in fuzz.findings.values()):
                break
    for name, number in fuzz.inputs.items():
        rate = round(number / max(fuzz.seconds[name], 1e-3))
        line = {"kind": name, "inputs": number, "per second": rate, "MiB": fuzz.growth[name]}
        print(json.dumps({**line, "found": fuzz.findings[name]}), flush=True)
    print(json.dumps({"inputs": sum(fuzz.inputs.values()), "kinds": len(fuzz.names), "found": found}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
