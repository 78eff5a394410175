"""Time from SIGKILL to the first step of the restarted process, with and without the compilation cache.

    python benchmarks/restart_time.py [--repeats 3]

The smoke model, and the same with 24 layers in each stack, are trained until their first checkpoint, killed, and
started again. A row has the median CPU seconds of the restarted process until its first step is in metrics.jsonl, which
other processes of the machine hardly change, and the median seconds since the kill, which they do.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODELS = {
    "smoke": (),
    "24 + 24 layers": ("--model.encoder.num-layers", "24", "--model.decoder.num-layers", "24"),
}
SAVED_STEP = 2
HEAD = """| model | compilation cache | CPU seconds to the first step | seconds since SIGKILL |
|---|---|---|---|"""


def start(root: Path, workdir: Path, model: tuple[str, ...], cached: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "t5x_like", "train", "smoke", "--workdir", str(workdir), *model]
    command += ["--checkpoints.save-every-steps", str(SAVED_STEP), "--monitoring.log-every-steps", "1"]
    command += ["--monitoring.max-starts-without-progress", "None", "--compilation-cache.enabled", str(cached)]
    with (root / "output.txt").open("ab") as output:
        return subprocess.Popen(command, cwd=root, stdout=output, stderr=output)


def lines_of(workdir: Path) -> set[str]:
    path = workdir / "metrics.jsonl"
    return {line for line in path.read_text().splitlines() if line.endswith("}")} if path.exists() else set()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def require_running(process: subprocess.Popen[bytes], root: Path) -> None:
    if process.poll() is not None:
        raise RuntimeError(
            f"train has ended with code {process.returncode}: {(root / 'output.txt').read_text()[-2000:]}"
        )


def measure(root: Path, workdir: Path, model: tuple[str, ...], cached: bool) -> tuple[float, float]:
    """Return CPU seconds and seconds of a restart."""
    process = start(root, workdir, model, cached)
    while not (workdir / "checkpoints" / str(SAVED_STEP)).exists():
        require_running(process, root)
        time.sleep(0.05)
    process.kill()
    killed = time.monotonic()
    process.wait()
    before = lines_of(workdir)
    process = start(root, workdir, model, cached)
    # Steps that are computed again have new times, so that their lines are new.
    while not lines_of(workdir) - before:
        require_running(process, root)
        time.sleep(0.02)
    result = cpu_seconds(process.pid), time.monotonic() - killed
    process.kill()
    process.wait()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {repeats} restarts each\n\n{HEAD}")
    root = Path(tempfile.mkdtemp(prefix="restart_time"))
    try:
        subprocess.run(
            [sys.executable, "-m", "t5x_like", "prepare", "smoke"], cwd=root, check=True, capture_output=True
        )
        for name, model in MODELS.items():
            for cached in (False, True):
                runs = [measure(root, root / f"run{number}", model, cached) for number in range(repeats)]
                cpu, seconds = (statistics.median(values) for values in zip(*runs, strict=True))
                print(f"| {name} | {'on' if cached else 'off'} | {cpu:.1f} | {seconds:.1f} |", flush=True)
                for number in range(repeats):
                    shutil.rmtree(root / f"run{number}")
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
