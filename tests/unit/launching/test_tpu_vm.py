"""Target tpu-vm from the first command to the last, with a fake gcloud whose worker is a directory of this machine."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.config_examples import REPOSITORY

from t5x_like.errors import UserError
from t5x_like.hardware.topologies import parse_topology
from t5x_like.launching import tpu_vm
from t5x_like.launching.executor import execute
from t5x_like.launching.job import Job
from t5x_like.launching.rendering import Recovery, Rendering
from t5x_like.launching.spot_supervisor import supervise

GCLOUD = r"""#!/bin/bash
# Runs shell commands and copies files as the real gcloud does; other commands are only recorded.
printf '%s\n' "${*:3:2}" >>"$CALLS"
case "$4" in
describe) if [ -e "$STATES" ]; then head -n 1 "$STATES"; sed -i 1d "$STATES"; else echo ACTIVE; fi ;;
ssh) for word; do case "$word" in --command=*) cd "$WORKER" && exec bash -c "${word#--command=}" ;; esac; done ;;
scp)
  words=()
  for word in "${@:5}"; do case "$word" in --*) ;; *) words+=("$word") ;; esac; done
  cp -- "${words[@]:0:${#words[@]}-1}" "$WORKER/${words[-1]#*:}" ;;
esac
"""
# Stands for the commands that create an environment and install the source, which the test has already.
PYTHON3 = r"""#!/bin/bash
if [ "$2 $3" = "uv venv" ]; then mkdir -p venv/bin && cp "$STUBS/train" venv/bin/python; fi
"""
# Interpreter of that environment: it runs the real restart loop; its training stops once with code 42 and then
# succeeds.
TRAIN = r"""#!/bin/bash
if [ "$3" = t5x_like.launching.restart_loop ]; then exec "$PYTHON" "$@" ; fi
printf '%s\0' "$@" >>"$WORKER/trained"
if [ "$TESTED" = forever ]; then trap 'exit 42' TERM; while :; do sleep 0.05; done; fi
[ -e "$WORKER/again" ] || { touch "$WORKER/again"; exit 42; }
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the home directory of a worker."""
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
        "STATES": str(tmp_path / "states"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return tmp_path / "worker"


def render(folder: Path, num_slices: int = 1, value: str = "", **options: bool) -> Rendering:
    job = Job("a run", "recipe.py", "runs/a run", ("--x", "it's"), env={"TESTED": value})
    topology = parse_topology("v5e:4x4", num_slices)
    spec = tpu_vm.TpuVm(
        job, topology, zone="z", source=str(folder / "source"), directory=folder / "launch files", **options
    )
    return tpu_vm.render(spec)


def wait_for(path: Path, text: str) -> str:
    deadline = time.monotonic() + 60
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < deadline, path.read_text() if path.exists() else f"no {path}"
        time.sleep(0.05)
    return path.read_text()


@pytest.mark.skipif(shutil.which("setsid") is None, reason="no setsid")
@pytest.mark.parametrize("num_slices", [1, 2])
def test_run_on_a_worker_is_restarted(worker: Path, num_slices: int) -> None:
    rendering = render(worker.parent, num_slices)
    # No delay between two runs.
    run = rendering.files[tpu_vm.RUN].replace("--max-restarts", "--restart-delay 0 --max-restarts")
    rendering = Rendering(rendering.directory, {**rendering.files, tpu_vm.RUN: run}, rendering.steps)
    assert execute(rendering, lambda line: None) == 0
    (home,) = worker.glob("a-run-*/")
    log = wait_for(home / "log.txt", "exit code 0")
    assert "exit code 42, restart 1 of 10" in log
    trained = (worker / "trained").read_bytes().decode().split("\0")[:-1]
    expected = ["-P", "-m", "t5x_like", "train", "recipe.py", "--workdir", "runs/a run", "--launcher", "gcetpu"]
    expected += ["--expect-processes", str(4 * num_slices), "--expect-devices", str(16 * num_slices), "--x", "it's"]
    assert trained == 2 * expected
    assert (home / "source/recipe.py").exists()
    calls = (worker.parent / "calls").read_text().splitlines()
    if num_slices == 1:
        assert calls == ["tpu-vm create", "tpu-vm ssh", "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh"]
    else:
        assert calls == [f"queued-resources {verb}" for verb in ("create", "describe", "ssh", "scp", "ssh", "ssh")]


@pytest.mark.skipif(shutil.which("setsid") is None or shutil.which("pkill") is None, reason="no setsid or pkill")
def test_stopped_run_is_not_restarted(worker: Path) -> None:
    rendering = render(worker.parent, value="forever")
    assert execute(rendering, lambda line: None) == 0
    (home,) = worker.glob("a-run-*/")
    wait_for(worker / "trained", "train")
    (stop,) = (step for step in rendering.steps if step.purpose == "save and stop without a restart")
    subprocess.run(stop.argv, check=True)
    assert wait_for(home / "log.txt", "exit code").splitlines()[-1] == "restart_loop: exit code 42"


@pytest.mark.skipif(shutil.which("setsid") is None, reason="no setsid")
@pytest.mark.parametrize("queued", [False, True])
def test_preempted_slice_is_requested_again_until_the_run_ends(
    worker: Path, monkeypatch: pytest.MonkeyPatch, queued: bool
) -> None:
    """The slice is preempted during the first run; the second one ends with code 0."""
    monkeypatch.setattr("t5x_like.launching.spot_supervisor.POLL_SECONDS", 0.2)
    monkeypatch.setattr("t5x_like.launching.executor._POLL_SECONDS", 0.0)
    states = ["ACTIVE", "ACTIVE", "SUSPENDED", "ACTIVE"] if queued else ["READY", "PREEMPTED"]
    (worker.parent / "states").write_text("".join(f"{state}\n" for state in states) + "ACTIVE\n" * 600)
    rendering = render(worker.parent, spot=True, queued=queued)
    run = rendering.files[tpu_vm.RUN].replace("--max-restarts", "--restart-delay 0 --max-restarts")
    # The process of the preempted slice vanishes with it.
    run = run.replace("code=0\n", '[ -e "$WORKER/second" ] || { touch "$WORKER/second"; exit 1; }\ncode=0\n')
    rendering = dataclasses.replace(rendering, files={**rendering.files, tpu_vm.RUN: run})
    assert rendering.recovery is not None
    lines: list[str] = []
    assert supervise(rendering, rendering.recovery, lines.append) == 0
    resource = "queued-resources" if queued else "tpu-vm"
    calls = (worker.parent / "calls").read_text().splitlines()
    assert calls.count(f"{resource} create") == 2 and calls.count(f"{resource} delete") == 1
    assert calls.index(f"{resource} delete") < len(calls) - 1 - calls[::-1].index(f"{resource} create")
    assert lines[-1] == "the run has ended with exit code 0"


def test_supervisor_gives_up_when_the_machines_were_deleted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("t5x_like.launching.spot_supervisor.POLL_SECONDS", 0.0)
    rendering = Rendering(tmp_path, {}, ())
    recovery = Recovery(state=("false",), lost=("PREEMPTED",), result=("false",), remove=("false",))
    with pytest.raises(UserError, match="not known after 10 tries"):
        supervise(rendering, recovery, lambda line: None)
    assert render(tmp_path).recovery is None, "machines that are not spot are not taken away"
