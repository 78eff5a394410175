"""Time from SIGKILL to the first step of the restarted process, with and without the compilation cache.

    python benchmarks/restart_time.py [--repeats 3]

The smoke model, and the same with 24 layers in each stack, are trained until their first checkpoint. Then each run is
killed and started again, without and with the cache in turns, so that other work of the machine meets both alike. A row
has the median CPU seconds of the restarted process until its first step is in metrics.jsonl, the median seconds since
the kill, and the medians of the ratios of neighboring restarts with and without the cache.
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
    "smoke, 3 + 3 layers": (),
    "24 + 24 layers": ("--model.encoder.num-layers", "24", "--model.decoder.num-layers", "24"),
}
"""Options of each model. Both have the widths of the smoke recipe: d_model 128, 4 heads, d_ff 384, 4352 tokens."""
SAVED_STEP = 2
HEAD = """| model | cache | CPU seconds to the first step | ratio | seconds since SIGKILL | ratio |
|---|---|---|---|---|---|"""


class Run:
    """A run that is killed and started again.

    Attributes:
      workdir: Its directory.
    """

    def __init__(self, root: Path, model: tuple[str, ...]) -> None:
        self.workdir = root / "run"
        self._root, self._output = root, root / "output.txt"
        options = ["--checkpoints.save-every-steps", str(SAVED_STEP), "--monitoring.log-every-steps", "1"]
        options += ["--monitoring.max-starts-without-progress", "None"]
        self._command = [sys.executable, "-m", "t5x_like", "train", "smoke", "--workdir", str(self.workdir)]
        self._command += [*model, *options]
        self._process = self._start(cached=True)
        while not (self.workdir / "checkpoints" / str(SAVED_STEP)).exists():
            self._require_running()
            time.sleep(0.05)

    def restart(self, *, cached: bool) -> tuple[float, float]:
        """Kill the process and start it again.

        Returns:
          CPU seconds of the new process until its first step is recorded, and seconds since the kill.
        """
        killed = time.monotonic()
        self.kill()
        before = self._lines()
        self._process = self._start(cached=cached)
        # Steps that are computed again have new times, so that their lines are new.
        while not self._lines() - before:
            self._require_running()
            time.sleep(0.02)
        return _cpu_seconds(self._process.pid), time.monotonic() - killed

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _start(self, *, cached: bool) -> subprocess.Popen[bytes]:
        command = [*self._command, "--compilation-cache.enabled", str(cached)]
        with self._output.open("ab") as output:
            return subprocess.Popen(command, cwd=self._root, stdout=output, stderr=output)

    def _lines(self) -> set[str]:
        path = self.workdir / "metrics.jsonl"
        return {line for line in path.read_text().splitlines() if line.endswith("}")} if path.exists() else set()

    def _require_running(self) -> None:
        if self._process.poll() is not None:
            raise RuntimeError(
                f"train has ended with code {self._process.returncode}: {self._output.read_text()[-2000:]}"
            )


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def measure(root: Path, name: str, model: tuple[str, ...], repeats: int) -> None:
    """Print the rows of a model."""
    run = Run(root, model)
    try:
        rounds = [[run.restart(cached=cached) for cached in (False, True)] for _ in range(repeats)]
    finally:
        run.kill()
    ratios = [statistics.median(on[i] / off[i] for off, on in rounds) for i in range(2)]
    for number, cached in enumerate(("off", "on")):
        medians = [statistics.median(one[number][i] for one in rounds) for i in range(2)]
        words = [
            f"{value:.1f} | {f'{ratio:.2f}' if number else ''}" for value, ratio in zip(medians, ratios, strict=True)
        ]
        print(f"| {name} | {cached} | {' | '.join(words)} |", flush=True)
    shutil.rmtree(run.workdir)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="restarts of each model with and without the cache")
    repeats = parser.parse_args().repeats
    print(f"{_cpu_name()}, {os.cpu_count()} cores, {repeats} restarts each\n\n{HEAD}", flush=True)
    root = Path(tempfile.mkdtemp(prefix="restart_time"))
    try:
        subprocess.run(
            [sys.executable, "-m", "t5x_like", "prepare", "smoke"], cwd=root, check=True, capture_output=True
        )
        for name, model in MODELS.items():
            measure(root, name, model, repeats)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
