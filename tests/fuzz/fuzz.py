"""Fuzzing of every reader of files that may come from others: `make fuzz FUZZ_SECONDS=60`.

Each kind of `helpers.foreign_files` has a process of its own, which reads randomly changed files for so many seconds.
Every input must be read or refused by a `UserError`. Another exception, the end of the process by a signal, more than
10 seconds for one input, and 2 GiB of memory more than for valid files are findings: the changed file is kept under
the number of the input, which makes it again with the same seed, and the exit code is 1. What was found belongs into
`FOUND` of `unit/test_foreign_files.py`, as a small change of a valid file.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import resource
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

HANG_SECONDS = 10.0
START_SECONDS = 600.0
MAX_GROWTH = 2048
"""MiB of resident memory above that after the valid files were read."""
MAX_ADDRESSES = 16 * 2**30
"""Bytes of addresses above those, which also limits what is allocated and not touched."""
MAX_FINDINGS = 10
"""Findings after which a kind is given up: more would be of the same kinds."""


class Progress:
    """Number of the input that a child process reads, and since when; 0 before its first input."""

    def __init__(self, values: Any) -> None:
        self._values = values  # Shared memory.

    def set(self, number: int, since: float) -> None:
        self._values[:] = (number, since)

    def get(self) -> tuple[int, float]:
        number, since = self._values[:]
        return int(number), since


def run_child(name: str, folder: Path, found: Path, seed: int, first: int, seconds: float, values: Any) -> None:
    """Read inputs from number `first` on for so many seconds; exit code 1 after an exception, which is kept."""
    logging.disable(logging.CRITICAL)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    progress, kind = Progress(values), KINDS[name]
    kind.read(folder)
    files = files_of(folder)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MAX_ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    number, deadline = first, time.monotonic() + seconds
    while time.monotonic() < deadline:
        progress.set(number, time.monotonic())
        file, data = changed(files, Random(f"{seed} {name} {number}"))
        (folder / file).write_bytes(data)
        try:
            read(kind, folder)
        except BaseException:
            keep(found, name, number, file, data, traceback.format_exc())
            os._exit(1)
        (folder / file).write_bytes(files[file])
        number += 1
    progress.set(number, time.monotonic())
    os._exit(0)


def keep(found: Path, name: str, number: int, file: str, data: bytes, reason: str) -> None:
    folder = folder_of(found, name, number)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file.replace("/", "__")).write_bytes(data)
    (folder / "reason.txt").write_text(reason)


def folder_of(found: Path, name: str, number: int) -> Path:
    return found / f"{name.replace('/', ' ')} {number}"


def fuzz(name: str, seed: int, seconds: float, found: Path) -> tuple[int, list[str], int]:
    """Return the number of inputs, the findings, and by how many MiB the resident memory grew at most."""
    context = multiprocessing.get_context("spawn")  # TensorStore does not survive a fork.
    findings: list[str] = []
    first, spent, growth = 0, 0.0, 0
    while spent < seconds and len(findings) < MAX_FINDINGS:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as root:
            folder = Path(root)
            KINDS[name].make(folder)
            valid = files_of(folder)
            values = context.Array("d", (first, 0.0), lock=False)
            process = context.Process(
                target=run_child, args=(name, folder, found, seed, first, seconds - spent, values)
            )
            process.start()
            started, read_since, at_start, reason = time.monotonic(), 0.0, 0, ""
            while process.is_alive():
                process.join(0.2)
                number, since = Progress(values).get()
                if since == 0.0:
                    at_start = resident(process.pid)
                    reason = "the valid files were not read" if time.monotonic() - started > START_SECONDS else ""
                else:
                    read_since = read_since or since
                    growth = max(growth, resident(process.pid) - at_start)
                    if time.monotonic() - since > HANG_SECONDS:
                        reason = f"no end after {HANG_SECONDS:g} seconds"
                    if growth > MAX_GROWTH:
                        reason = f"{growth} MiB"
                if reason:
                    process.kill()
                    process.join()
            number, _ = Progress(values).get()
            spent += time.monotonic() - (read_since or started)
            if process.exitcode == 0:
                return number, findings, growth
            if process.exitcode is not None and process.exitcode < 0:
                reason = reason or signal.Signals(-process.exitcode).name
                file, data = changed(valid, Random(f"{seed} {name} {number}"))
                keep(found, name, number, file, data, reason)
            kept = folder_of(found, name, number) / "reason.txt"
            findings.append(f"input {number}: {kept.read_text().splitlines()[-1] if kept.is_file() else 'no input'}")
            first, growth = number + 1, 0
    return first, findings, growth


def resident(pid: int | None) -> int:
    """Return the peak of the resident memory of a process in MiB; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM")), 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="time for each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--found", type=Path, default=Path("build/fuzz"), help="folder for what is found")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    options = parser.parse_args()
    total, all_findings = 0, []
    for name in options.kinds:
        began = time.process_time(), time.monotonic()
        number, findings, memory = fuzz(name, options.seed, options.seconds, options.found)
        total += number
        all_findings += [f"{name}: {text}" for text in findings]
        line = {
            "kind": name,
            "inputs": number,
            "per second": round(number / (time.monotonic() - began[1])),
            "MiB": memory,
        }
        print(json.dumps({**line, "found": findings}), flush=True)
    print(json.dumps({"inputs": total, "kinds": len(options.kinds), "found": len(all_findings)}))
    return 1 if all_findings else 0


if __name__ == "__main__":
    sys.exit(main())
