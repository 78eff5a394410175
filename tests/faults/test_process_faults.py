"""Faults of processes, storage and services during a run: it ends as the undisturbed run, or with the reason."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.fault_runs import (
    LAST_STEP,
    RECIPE,
    Workspace,
    assert_same_end,
    children,
    fill,
    finish,
    logged,
    newest,
    records_of,
    wait_for,
)
from helpers.recorded_rows import recorded_rows
from helpers.saved_state import saved_state

from t5x_like.errors import EXIT_OK, EXIT_REFUSED, EXIT_RESUMABLE, RESTART_CODES
from t5x_like.launching import restart_loop
from t5x_like.launching.restart_loop import Supervisor

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SECONDS = 800.0
"""Limit of a run of two processes, on a machine that does other work."""
SAVE_LIMIT = "40"
"""Limit of a save in seconds, for a storage that does not answer. The first save of a process may compile."""
Uninterrupted = Callable[[str], Path]


@pytest.mark.parametrize("phase", ["save", "evaluation"])
def test_sigterm_during_a_save_or_an_evaluation(
    workspace: Workspace, uninterrupted: Uninterrupted, tmp_path: Path, phase: str
) -> None:
    """The run ends with a checkpoint of the step that it had reached, and resumes to the same end."""
    workdir = tmp_path / "run"
    process = workspace.train(workdir)
    wait_for(workdir / "checkpoints" / "8", process)
    if phase == "save":
        wait_for(workdir / "checkpoints" / "16.saving", process)
    else:  # That of the end of the run.
        wait_for(workdir / "checkpoints" / str(LAST_STEP), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    record = json.loads((workdir / "exit.json").read_text())
    # An evaluation after the last step is finished: nothing is left to resume.
    assert process.returncode == record["code"] == (EXIT_RESUMABLE if phase == "save" else EXIT_OK), output
    assert newest(workdir) == record["step"]
    finish(workspace.train(workdir))
    assert_same_end(workdir, uninterrupted("recipe"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_the_process_at_once(
    workspace: Workspace, uninterrupted: Uninterrupted, tmp_path: Path, number: signal.Signals
) -> None:
    workdir = tmp_path / "run"
    process = workspace.train(workdir)
    wait_for(workdir / "checkpoints" / "8", process)
    process.send_signal(signal.SIGSTOP)  # Both arrive before the process can have ended by the first one.
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    while process.poll() is None:
        process.send_signal(number)
    assert process.wait() in (128 + number, EXIT_RESUMABLE, -number)
    finish(workspace.train(workdir))
    assert_same_end(workdir, uninterrupted("recipe"))


def test_process_killed_after_its_last_save(workspace: Workspace, uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    """The next process trains no step, and completes the evaluation."""
    workdir = tmp_path / "run"
    workspace.train_and_kill(workdir, step=LAST_STEP)
    before = (workdir / "metrics.jsonl").read_bytes()
    finish(workspace.train(workdir))
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert_same_end(workdir, uninterrupted("recipe"))
    assert "nothing to train" in finish(workspace.train(workdir))


def test_service_of_a_metric_writer_that_fails(
    workspace: Workspace, uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    output = finish(workspace.train(tmp_path / "run", recipe="broken_writer"))
    assert output.count("the service does not answer") <= 2 and "Traceback" not in output
    assert_same_end(tmp_path / "run", uninterrupted("recipe"))


def test_storage_that_becomes_read_only(
    workspace: Workspace, uninterrupted: Uninterrupted, tmp_path: Path, mount_disk: Callable[[int], Path]
) -> None:
    disk = mount_disk(64)
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "checkpoints").symlink_to(disk)
    process = workspace.train(workdir)
    wait_for(workdir / "checkpoints" / "8", process)
    # Refused as long as a save is in progress.
    while subprocess.run(["mount", "-o", "remount,ro", disk], capture_output=True).returncode:
        assert process.poll() is None
    output = finish(process, code=EXIT_REFUSED)
    assert "Read-only file system" in output and "Traceback" not in output
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    finish(workspace.train(workdir))
    assert_same_end(workdir, uninterrupted("recipe"))


def test_second_process_in_a_run_directory_is_refused(
    workspace: Workspace, uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    """The refusal names the holder. Once this is killed, the next process takes the directory over."""
    workdir = tmp_path / "run"
    process = workspace.train(workdir)
    wait_for(workdir / "checkpoints" / "8", process)
    process.send_signal(signal.SIGSTOP)
    before = (workdir / "metrics.jsonl").read_bytes(), newest(workdir)
    output = finish(workspace.train(workdir), EXIT_REFUSED)
    assert str(process.pid) in output and socket.gethostname() in output and "Traceback" not in output
    assert ((workdir / "metrics.jsonl").read_bytes(), newest(workdir)) == before
    process.kill()
    process.communicate()
    finish(workspace.train(workdir))
    assert_same_end(workdir, uninterrupted("recipe"))


def test_file_system_without_inodes(workspace: Workspace, mount_disk: Callable[..., Path]) -> None:
    """There are bytes left, and no inodes: the message says so."""
    disk = mount_disk(64, inodes=60)
    process = workspace.train(disk / "run", "--checkpoints.max-to-keep", "50")
    output = finish(process, code=EXIT_REFUSED)
    assert "no inodes are free" in output and "Traceback" not in output


def test_launcher_does_not_restart_a_run_on_a_full_disk(
    workspace: Workspace, uninterrupted: Uninterrupted, tmp_path: Path, mount_disk: Callable[[int], Path]
) -> None:
    """The disk becomes full during a save: the job ends, with its checkpoints, and resumes when there is space."""
    disk, workdir = mount_disk(12), tmp_path / "run"
    workdir.mkdir()
    (workdir / "checkpoints").symlink_to(disk)
    process = workspace.launch(workdir)
    wait_for(disk / "8", process)
    saved = sum(path.stat().st_size for path in (disk / "8").rglob("*") if path.is_file())
    filler = fill(disk, left=saved // 2)
    output = finish(process, EXIT_REFUSED)
    assert "No space left on device" in output and "Traceback" not in output and ", restart " not in output
    assert json.loads((workdir / "exit.json").read_text())["code"] == EXIT_REFUSED
    # Not necessarily step 8: a machine that does other work may have saved more before the disk was full. The next
    # start removes what the failed save has left.
    left = {path.name for path in disk.iterdir()} - {"filler", "run_id"}
    kept = {name for name in left if name.isdecimal()}
    assert kept and all(re.fullmatch(r"\d+\.saving.*", name) for name in left - kept)
    filler.unlink()
    output = finish(workspace.launch(workdir))
    assert f"step {max(map(int, kept))}" in output
    assert_same_end(workdir, uninterrupted("recipe"))


def test_launcher_restarts_a_run_whose_storage_did_not_answer(
    workspace: Workspace, uninterrupted: Uninterrupted, tmp_path: Path, cover: Callable[[Path], Callable[[], None]]
) -> None:
    undisturbed, workdir = uninterrupted("recipe"), tmp_path / "run"  # Its programs are compiled then.
    process = workspace.launch(workdir, "--timeouts.save", SAVE_LIMIT)
    wait_for(workdir / "checkpoints" / "8", process)
    first = children(process)
    uncover = cover(workdir / "checkpoints")
    while children(process) == first:
        assert process.poll() is None
        time.sleep(0.1)
    uncover()
    output = finish(process)
    assert f"exit code {EXIT_RESUMABLE}, restart 1 of 3" in output and "Traceback" not in output
    stacks = (workdir / "stacks.0.txt").read_text()
    assert f"the stage 'save' takes longer than {SAVE_LIMIT} seconds" in stacks and "session.py" in stacks
    assert_same_end(workdir, undisturbed)


def test_stacks_are_printed_if_the_run_directory_does_not_answer(
    workspace: Workspace, tmp_path: Path, cover: Callable[[Path], Callable[[], None]]
) -> None:
    workdir = tmp_path / "run"
    # The process looks for a request of a profile after each step, and saves at every eighth.
    process = workspace.launch(workdir, "--timeouts.save", SAVE_LIMIT, "--timeouts.step", SAVE_LIMIT, max_restarts=0)
    wait_for(workdir / "checkpoints" / "8", process)
    cover(workdir)
    output = finish(process, EXIT_RESUMABLE)
    assert f"takes longer than {SAVE_LIMIT} seconds" in output and "session.py" in output and "Traceback" not in output


@contextlib.contextmanager
def frozen(disk: Path) -> Iterator[None]:
    """Freeze a file system; it answers again however the test ends."""
    script = 'fsfreeze --freeze "$0" && echo frozen && read -r _; fsfreeze --unfreeze "$0"'
    with subprocess.Popen(["sh", "-c", script, disk], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as freezer:
        assert freezer.stdout is not None and freezer.stdout.readline() == b"frozen\n"
        yield


@contextlib.contextmanager
def slowed(disk: Path, seconds: float) -> Iterator[None]:
    """Freeze a file system for some seconds again and again, with a short time between, in which writes complete."""
    ended = threading.Event()

    def freeze() -> None:
        while not ended.is_set():
            with frozen(disk):
                ended.wait(seconds)
            ended.wait(0.3)

    thread = threading.Thread(target=freeze)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_storage_that_is_slow_delays_a_run_and_costs_it_nothing_else(
    workspace: Workspace, uninterrupted: Uninterrupted, tmp_path: Path, mount_image: Callable[[int], Path]
) -> None:
    undisturbed, disk, workdir = uninterrupted("recipe"), mount_image(64), tmp_path / "run"
    workdir.mkdir()
    (workdir / "checkpoints").symlink_to(disk)
    with slowed(disk, 3.0):
        output = finish(workspace.train(workdir, "--checkpoints.grace-seconds", "1"))
    assert "expected at most 1 s (checkpoints.grace_seconds)" in output and "Traceback" not in output
    # The run waits for the save before each save, and for the last one.
    assert json.loads((workdir / "exit.json").read_text())["seconds"]["save"] > 3.0
    assert_same_end(workdir, undisturbed)


WRITES_AND_EXITS = """
import os, sys, threading, time
threading.Thread(target=lambda: (time.sleep(0.5), os._exit(42))).start()
open(sys.argv[1], "w").write("x")
"""


def test_restart_loop_gives_up_a_process_that_waits_for_a_frozen_disk(
    mount_image: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first thread waits in the kernel and another one has called exit: not even SIGKILL ends the process."""
    monkeypatch.setattr(restart_loop, "KILL_SECONDS", 0.5)
    monkeypatch.setattr(restart_loop, "_POLL_SECONDS", 0.05)
    disk = mount_image(32)
    with frozen(disk):
        command = [sys.executable, "-c", WRITES_AND_EXITS, str(disk / "x")]
        code = Supervisor(command, max_restarts=1, restart_codes=(EXIT_RESUMABLE,), seconds=0).run()
    output = capfd.readouterr().err
    assert code == EXIT_RESUMABLE and "cannot be killed" in output and "restart 1" not in output


@pytest.mark.parametrize("launched", [False, True], ids=["alone", "launched"])
def test_save_on_a_frozen_file_system_is_reported(
    workspace: Workspace,
    uninterrupted: Uninterrupted,
    tmp_path: Path,
    mount_image: Callable[[int], Path],
    launched: bool,
) -> None:
    """A thread that waits for a frozen file system ends when this answers again, and not even by SIGKILL before. The
    stacks and exit.json do not wait for that, and neither does the launcher, which restarts nothing beside it."""
    undisturbed, disk, workdir = uninterrupted("recipe"), mount_image(64), tmp_path / "run"
    workdir.mkdir()
    (workdir / "checkpoints").symlink_to(disk)
    process = (workspace.launch if launched else workspace.train)(workdir, "--timeouts.save", SAVE_LIMIT)
    wait_for(disk / "8", process)
    started = children(process)
    with frozen(disk):
        wait_for(workdir / "exit.json", process)
        if launched:
            output = finish(process, EXIT_RESUMABLE)
            assert "process 0 cannot be killed" in output and ", restart " not in output
            assert all(Path(f"/proc/{pid}").exists() for pid in started)
    record = json.loads((workdir / "exit.json").read_text())
    assert record["code"] == EXIT_RESUMABLE
    assert f"the stage 'save' takes longer than {SAVE_LIMIT} seconds" in record["reason"]
    assert "session.py" in (workdir / "stacks.0.txt").read_text()
    if not launched:
        finish(process, EXIT_RESUMABLE)
    while any(Path(f"/proc/{pid}").exists() for pid in started):
        time.sleep(0.1)
    finish(workspace.train(workdir))
    assert_same_end(workdir, undisturbed)


def test_port_of_the_coordinator_is_taken(workspace: Workspace, tmp_path: Path) -> None:
    """The message says so; the local launcher starts the processes again, with another port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        variables = {"TAKEN_PORT": str(taken.getsockname()[1])}
        options = ("-n", "2", "--devices-per-process", "1", "--", sys.executable, "-m", "t5x_like")
        train = ("train", f"{RECIPE}:recipe", "--workdir", tmp_path / "run", "--training.num-train-steps", "2")
        process = workspace.start(
            *options, *train, "--sharding.data", "2", module="helpers.taken_port_launch", variables=variables
        )
        output = finish(process)
    assert "address already in use" in output and f"exit code {EXIT_RESUMABLE}, restart 1 of" in output
    assert ", restart 2 of" not in output and "Traceback" not in output
    assert newest(tmp_path / "run") == 2


def test_coordinator_whose_name_is_unknown(workspace: Workspace, tmp_path: Path) -> None:
    """A failure of the name service during the start is named within the limit, by a code that restarts."""
    flags = ("--coordinator", "coordinator.invalid:4711", "--num-processes", "2", "--process-id", "1")
    process = workspace.train(tmp_path / "run", *flags, "--initialization-timeout", "3")
    output = finish(process, EXIT_RESUMABLE, seconds=100)
    assert "could not connect to process 0 at coordinator.invalid:4711 within 3 seconds" in output
    assert "ame or service not known" in output or "name resolution" in output
    assert "Traceback" not in output


class Pair:
    """Runs of two processes with two devices each."""

    recipe = f"{RECIPE.with_name('multiprocess_recipe.py')}:encoder_decoder"
    last_step = 24

    def __init__(self, workspace: Workspace):
        self._workspace = workspace
        self.undisturbed = workspace.directory / "undisturbed_pair"
        finish(self.train(self.undisturbed), seconds=SECONDS)

    def train(self, workdir: Path, *overrides: str, **program: dict[str, str]) -> subprocess.Popen[str]:
        cache = self._workspace.directory / "compiled_for_two"
        variables = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        module = program.get("module", "t5x_like")
        environment = {**variables, **program.get("variables", {})}
        launcher = ("-n", "2", "--devices-per-process", "2", "--max-restarts", "0", "--")
        command = (*launcher, sys.executable, "-m", module)
        options = ("train", self.recipe, "--workdir", str(workdir), "--sharding.data", "2", *overrides)
        return self._workspace.start(*command, *options, module="t5x_like.launching.local", variables=environment)


@pytest.fixture(scope="module")
def pair(workspace: Workspace) -> Iterator[Pair]:
    recipe = RECIPE.with_name("multiprocess_recipe.py")
    finish(workspace.start("prepare", f"{recipe}:encoder_decoder"))
    yield Pair(workspace)


def test_one_of_two_processes_is_killed_during_a_save(pair: Pair, tmp_path: Path) -> None:
    """Both end with a code that restarts, the torn save is not listed, and the end is that of the undisturbed run."""
    workdir = tmp_path / "run"
    process = pair.train(workdir)
    wait_for(workdir / "checkpoints" / "8.saving", process)
    os.kill(children(process)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode in RESTART_CODES, output
    assert newest(workdir) in (4, 8)
    finish(pair.train(workdir), seconds=SECONDS)
    assert logged(workdir) == logged(pair.undisturbed)
    assert recorded_rows(workdir) == recorded_rows(pair.undisturbed)
    states = [saved_state(directory, pair.last_step) for directory in (workdir, pair.undisturbed)]
    assert all(states[0][path].tobytes() == leaf.tobytes() for path, leaf in states[1].items())


@pytest.mark.parametrize("policy", ["skip", "abort", "rollback"])
def test_loss_of_one_of_two_processes_is_nan(pair: Pair, tmp_path: Path, policy: str) -> None:
    """Only rows of process 1 are bad, and both processes reject the same step, 12, of rows 88 to 95."""
    poisoned = {"module": "helpers.poisoned_train", "variables": {"POISONED_ROW": "88", "POISONED_PROCESS": "1"}}
    workdir = tmp_path / "run"
    # A run ends when all steps of a logging interval are rejected.
    options = ("--training.guard.policy", policy, "--monitoring.log-every-steps", "2")
    process = pair.train(workdir, *options, **poisoned)
    output = finish(process, EXIT_REFUSED if policy == "abort" else EXIT_OK, SECONDS)
    assert re.search(r"step 12 (had|was rejected)", output)
    (rejected,) = records_of(workdir / "rejected_steps.jsonl")
    assert (rejected["step"], rejected["first_row"], rejected["last_row"]) == (12, 88, 95)
    steps = [line["step"] for line in logged(workdir)]
    match policy:
        case "skip":
            assert steps == list(range(2, 25, 2)) and newest(workdir) == 24
        case "abort":
            assert newest(workdir) == 8
        case "rollback":
            assert steps == list(range(2, 25, 2)) and newest(workdir) == 24
            ((restored, step, row),) = json.loads((workdir / "run.json").read_text())["rollbacks"]
            assert (step, row) == (12, 96)
            used = [index for rows in recorded_rows(workdir).values() for _, index, _ in rows]
            after = range(96, 96 + 8 * (24 - restored))
            assert sorted(used) == [*range(8 * restored), *after]
