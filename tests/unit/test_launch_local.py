"""Several processes on one machine: their output, their codes, their signals, and that none of them stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from t5x_like.config import UserError
from t5x_like.launching.local import describe, launch_local, process_environment

# Without site packages a process starts in some milliseconds.
PYTHON = (sys.executable, "-S", "-c")
WHO = "import os, sys, time, signal; me = int(os.environ['JAX_PROCESS_ID']);"
LAUNCHER = (sys.executable, "-m", "t5x_like.launching.local", "-n", "2", "--")


def is_alive(pid: int) -> bool:
    """Not counting those that have ended and that nobody has asked about."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pids_of(directory: Path, count: int) -> list[int]:
    deadline = time.monotonic() + 30
    while len(found := [path for path in directory.glob("*") if path.read_text()]) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [int(path.read_text()) for path in found]


def writes_pid(directory: Path) -> str:
    return f"{WHO} open(os.path.join({str(directory)!r}, str(me)), 'w').write(str(os.getpid()));"


def test_output_has_the_process_in_front_and_goes_to_its_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = f"{WHO} print('out', me); print('err', me, file=sys.stderr)"
    assert launch_local([*PYTHON, code], processes=2, log_dir=tmp_path) == 0
    captured = capfd.readouterr()
    assert sorted(captured.out.splitlines()) == ["[0] out 0", "[1] out 1"]
    assert sorted(captured.err.splitlines()) == ["[0] err 0", "[1] err 1"]
    assert sorted((tmp_path / "process.1.txt").read_text().splitlines()) == ["err 1", "out 1"]


def test_logs_that_cannot_be_written_are_said_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--log-dir"):
        launch_local([*PYTHON, writes_pid(tmp_path)], processes=1, log_dir=tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("ending, code", [("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", 137)])
def test_the_first_failure_ends_all_and_is_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], ending: str, code: int
) -> None:
    monkeypatch.setattr("t5x_like.launching.local.FAREWELL_SECONDS", 0.2)
    # Process 0 ignores what it is asked; process 1 fails.
    body = (
        f"{writes_pid(tmp_path)} signal.signal(signal.SIGTERM, signal.SIG_IGN);\nif me == 0: time.sleep(60)\n{ending}"
    )
    assert launch_local([*PYTHON, body], processes=2) == code
    assert not any(map(is_alive, pids_of(tmp_path, 2)))
    assert f"process 1 ended with exit code {code}" in capfd.readouterr().err


def test_a_signal_reaches_each_process_once_and_their_code_is_the_answer(tmp_path: Path) -> None:
    body = f"""{WHO}
count = 0
def handle(number, frame):
    global count
    count += 1
signal.signal(signal.SIGINT, handle)
open(os.path.join({str(tmp_path)!r}, str(me)), 'w').write(str(os.getpid()))
while not count: time.sleep(0.02)
time.sleep(0.3)
sys.exit(42 if count == 1 else 1)
"""
    launcher = subprocess.Popen([*LAUNCHER, *PYTHON, body])
    pids_of(tmp_path, 2)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=30) == 42


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ends a process with its parent")
def test_no_process_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    body = f"{writes_pid(tmp_path)} signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    launcher = subprocess.Popen([*LAUNCHER, *PYTHON, body])
    pids = pids_of(tmp_path, 2)
    assert all(map(is_alive, pids))
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 10
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_processes_are_told_who_they_are() -> None:
    one = process_environment(1, 4, 99, 2, {"JAX_PLATFORMS": "cpu"})
    assert one["JAX_COORDINATOR_ADDRESS"] == one["JAX_COORDINATOR_BIND_ADDRESS"] == "127.0.0.1:99"
    assert (one["JAX_PROCESS_ID"], one["JAX_NUM_PROCESSES"], one["JAX_NUM_CPU_DEVICES"]) == ("1", "4", "2")
    assert "no_proxy" not in one
    proxied = process_environment(0, 1, 99, None, {"https_proxy": "http://proxy", "no_proxy": "a"})
    assert proxied["no_proxy"] == "a,127.0.0.1,localhost"
    shell = describe(["echo", "a b; $(x)"], 2, None)
    environment = {**os.environ, "PATH": os.environ["PATH"]}
    printed = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, env=environment).stdout
    assert printed == "a b; $(x)\n" * 2
