"""Local launcher: output, exit codes and signals of its processes, none of which outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from t5x_like.errors import EXIT_OK, EXIT_REFUSED, EXIT_RESUMABLE, RESTART_CODES, UserError
from t5x_like.launching import local
from t5x_like.launching.local import describe, launch_local, process_environment

# Without site packages a process starts in a few milliseconds.
PYTHON = (sys.executable, "-S", "-c")
PRELUDE = "import os, sys, time, signal; me = int(os.environ['JAX_PROCESS_ID']);"
LAUNCHER = (sys.executable, "-m", "t5x_like.launching.local", "-n", "2", "--")


def is_alive(pid: int) -> bool:
    """Return whether a process is running; zombies do not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pids_of(directory: Path, count: int) -> list[int]:
    deadline = time.monotonic() + 120
    while len(found := [path for path in directory.glob("*") if path.read_text()]) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [int(path.read_text()) for path in found]


def writes_pid(directory: Path) -> str:
    return f"{PRELUDE} open(os.path.join({str(directory)!r}, str(me)), 'w').write(str(os.getpid()));"


def test_output_is_prefixed_and_logged_per_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = f"{PRELUDE} print('out', me); print('err', me, file=sys.stderr)"
    assert launch_local([*PYTHON, code], processes=2, log_dir=tmp_path) == 0
    captured = capfd.readouterr()
    assert sorted(captured.out.splitlines()) == ["[0] out 0", "[1] out 1"]
    assert sorted(captured.err.splitlines()) == ["[0] err 0", "[1] err 1"]
    assert sorted((tmp_path / "process.1.txt").read_text().splitlines()) == ["err 1", "out 1"]


def test_unwritable_log_dir_is_refused_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--log-dir"):
        launch_local([*PYTHON, writes_pid(tmp_path)], processes=1, log_dir=tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("ending, code", [("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", 137)])
def test_first_failure_ends_all_processes_and_gives_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], ending: str, code: int
) -> None:
    monkeypatch.setattr("t5x_like.launching.local.EXIT_GRACE_SECONDS", 0.2)
    # Process 0 ignores SIGTERM; process 1 fails when process 0 has come so far.
    body = f"""{PRELUDE} signal.signal(signal.SIGTERM, signal.SIG_IGN)
{writes_pid(tmp_path)}
if me == 0: time.sleep(300)
while not os.path.exists({str(tmp_path / "0")!r}): time.sleep(0.01)
{ending}
"""
    assert launch_local([*PYTHON, body], processes=2, max_restarts=0) == code
    assert not any(map(is_alive, pids_of(tmp_path, 2)))
    assert f"process 1 ended with exit code {code}" in capfd.readouterr().err


def test_all_processes_are_started_again_until_a_code_that_is_not_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Process 1 ends in turn with each code of the table that is restarted, then with that of a crash loop."""
    monkeypatch.setattr("t5x_like.launching.local.RESTART_DELAY_SECONDS", 0.0)
    monkeypatch.setattr("t5x_like.launching.local.EXIT_GRACE_SECONDS", 0.1)
    monkeypatch.setattr("t5x_like.launching.local.RESUMABLE_EXIT_GRACE_SECONDS", 0.1)
    body = f"""{PRELUDE}
starts = os.path.join({str(tmp_path)!r}, str(me))
open(starts, 'a').write(os.environ['JAX_COORDINATOR_ADDRESS'] + '\\n')
if me == 0: time.sleep(300)
def lines(index):
    path = os.path.join({str(tmp_path)!r}, str(index))
    return len(open(path).readlines()) if os.path.exists(path) else 0
while lines(0) < lines(1): time.sleep(0.01)
codes = {[*RESTART_CODES, EXIT_REFUSED, EXIT_OK]}
sys.exit(codes[lines(1) - 1])
"""
    assert launch_local([*PYTHON, body], processes=2) == EXIT_REFUSED
    starts = [(tmp_path / name).read_text().splitlines() for name in ("0", "1")]
    assert starts[0] == starts[1] and len(starts[0]) == len(RESTART_CODES) + 1
    assert len(set(starts[0])) > 1, "each start has a port of its own"
    assert f"exit code {RESTART_CODES[-1]}, restart {len(RESTART_CODES)} of 10" in capfd.readouterr().err


# As when a thread waits in the kernel for a disk: the first thread has ended, and another one has not.
ENDS_BY_HALF = "import ctypes, threading; threading.Thread(target=time.sleep, args=(600,)).start();"
EXITS_ALONE = "ctypes.CDLL(None).pthread_exit(None)"


@pytest.mark.parametrize("can_be_killed", [True, False])
def test_a_process_whose_threads_do_not_all_end_is_killed_or_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], can_be_killed: bool
) -> None:
    # A process that can be killed must end within this time, also on a loaded machine.
    monkeypatch.setattr(local, "KILL_SECONDS", 5.0 if can_be_killed else 1.0)
    kill = local._ProcessGroup.kill
    groups = []
    if not can_be_killed:
        monkeypatch.setattr(local._ProcessGroup, "kill", lambda group, **keywords: groups.append(group))
    code = f"{writes_pid(tmp_path)} {ENDS_BY_HALF} {EXITS_ALONE}"
    result = launch_local([*PYTHON, code], processes=1, max_restarts=1, restart_codes=(EXIT_RESUMABLE,))
    output = capfd.readouterr().err
    if can_be_killed:
        assert result == 128 + signal.SIGKILL and "cannot be killed" not in output
    else:
        # It is not started again beside the process that still runs.
        assert result == EXIT_RESUMABLE and "process 0 cannot be killed" in output and "restart 1" not in output
        kill(groups[-1])
    assert "killing process 0, still running" in output


def test_signal_reaches_each_process_once_and_their_exit_code_is_returned(tmp_path: Path) -> None:
    body = f"""{PRELUDE}
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
    assert launcher.wait(timeout=120) == 42


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux kills a process with its parent")
def test_no_process_outlives_a_killed_launcher(tmp_path: Path) -> None:
    body = f"{PRELUDE} signal.signal(signal.SIGTERM, signal.SIG_IGN); {writes_pid(tmp_path)} time.sleep(300)"
    launcher = subprocess.Popen([*LAUNCHER, *PYTHON, body])
    pids = pids_of(tmp_path, 2)
    assert all(map(is_alive, pids))
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 60
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_environment_identifies_each_process() -> None:
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
