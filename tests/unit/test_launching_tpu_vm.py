"""The target tpu-vm from its first command to the last, with a gcloud whose worker is a folder of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from config_examples import REPOSITORY

from t5x_like.launching import tpu_vm
from t5x_like.launching.execute import execute
from t5x_like.launching.job import Job
from t5x_like.launching.rendering import Rendering
from t5x_like.planning.topologies import parse_topology

GCLOUD = r"""#!/bin/bash
# What the real one does with a worker's shell and files; the rest is only written down.
printf '%s\n' "${*:3:2}" >>"$CALLS"
case "$4" in
describe) echo ACTIVE ;;
ssh) for word; do case "$word" in --command=*) cd "$WORKER" && exec bash -c "${word#--command=}" ;; esac; done ;;
scp)
  words=()
  for word in "${@:5}"; do case "$word" in --*) ;; *) words+=("$word") ;; esac; done
  cp -- "${words[@]:0:${#words[@]}-1}" "$WORKER/${words[-1]#*:}" ;;
esac
"""
# What makes an environment and installs the source in it, of which the test has one already.
PYTHON3 = r"""#!/bin/bash
if [ "$2 $3" = "uv venv" ]; then mkdir -p venv/bin && cp "$STUBS/train" venv/bin/python; fi
"""
# The interpreter of that environment: it supervises as the real one, and as a training is stopped once, then done.
TRAIN = r"""#!/bin/bash
if [ "$2" = t5x_like.launching.supervise ]; then exec "$PYTHON" "$@" ; fi
printf '%s\0' "$@" >>"$WORKER/trained"
if [ "$TESTED" = forever ]; then trap 'exit 42' TERM; while :; do sleep 0.05; done; fi
[ -e "$WORKER/again" ] || { touch "$WORKER/again"; exit 42; }
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home directory of a worker."""
    stubs = tmp_path / "stubs"
    for path in (stubs, tmp_path / "worker", tmp_path / "source"):
        path.mkdir()
    for name, text in {"gcloud": GCLOUD, "python3": PYTHON3, "train": TRAIN, "sudo": "#!/bin/sh\ncat\n"}.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    (tmp_path / "source" / "recipe.py").write_text("")
    for name, value in {
        "PATH": f"{stubs}:{os.environ['PATH']}", "WORKER": str(tmp_path / "worker"), "STUBS": str(stubs),
        "PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY), "CALLS": str(tmp_path / "calls"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return tmp_path / "worker"


def render(folder: Path, num_slices: int = 1, value: str = "") -> Rendering:
    job = Job("a run", "recipe.py", "runs/a run", ("--x", "it's"), env={"TESTED": value})
    topology = parse_topology("v5e:4x4", num_slices)
    spec = tpu_vm.TpuVm(job, topology, zone="z", source=str(folder / "source"), directory=folder / "launch files")
    return tpu_vm.render(spec)


def wait_for(path: Path, text: str) -> str:
    deadline = time.monotonic() + 60
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < deadline, path.read_text() if path.exists() else f"no {path}"
        time.sleep(0.05)
    return path.read_text()


@pytest.mark.skipif(shutil.which("setsid") is None, reason="no setsid")
@pytest.mark.parametrize("num_slices", [1, 2])
def test_a_run_on_a_worker(worker: Path, num_slices: int) -> None:
    rendering = render(worker.parent, num_slices)
    # The supervisor waits between two runs; here it need not.
    run = rendering.files[tpu_vm.RUN].replace("--max-restarts", "--seconds-between 0 --max-restarts")
    rendering = Rendering(rendering.directory, {**rendering.files, tpu_vm.RUN: run}, rendering.steps)
    assert execute(rendering, lambda line: None) == 0
    (home,) = worker.glob("a-run-*/")
    log = wait_for(home / "log.txt", "exit code 0")
    assert "exit code 42, restart 1 of 10" in log
    trained = (worker / "trained").read_bytes().decode().split("\0")[:-1]
    expected = ["-m", "t5x_like", "train", "recipe.py", "--workdir", "runs/a run", "--launcher", "gcetpu"]
    expected += ["--expect-processes", str(4 * num_slices), "--expect-devices", str(16 * num_slices), "--x", "it's"]
    assert trained == 2 * expected
    assert (home / "source/recipe.py").exists()
    calls = (worker.parent / "calls").read_text().splitlines()
    if num_slices == 1:
        assert calls == ["tpu-vm create", "tpu-vm ssh", "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh"]
    else:
        assert calls == [f"queued-resources {verb}" for verb in ("create", "describe", "ssh", "scp", "ssh", "ssh")]


@pytest.mark.skipif(shutil.which("setsid") is None or shutil.which("pkill") is None, reason="no setsid or pkill")
def test_a_run_is_stopped_for_good(worker: Path) -> None:
    rendering = render(worker.parent, value="forever")
    assert execute(rendering, lambda line: None) == 0
    (home,) = worker.glob("a-run-*/")
    wait_for(worker / "trained", "train")
    (stop,) = (step for step in rendering.steps if step.purpose == "save and leave, for good")
    subprocess.run(stop.argv, check=True)
    assert wait_for(home / "log.txt", "exit code").splitlines()[-1] == "supervise: exit code 42"
