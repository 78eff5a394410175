"""A process that stays in a stage for too long ends itself and leaves its stacks in the run directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.config_examples import REPOSITORY

from t5x_like.config import TimeoutsConfig
from t5x_like.errors import EXIT_REFUSED, EXIT_RESUMABLE
from t5x_like.monitoring.time_tracker import STATES, TimeTracker
from t5x_like.trainer.watchdog import FLOORS, MEASURED_VISITS, Watchdog, stage_limits

SCRIPT = """
import pathlib, sys, threading, time
from t5x_like.config import TimeoutsConfig
from t5x_like.monitoring.time_tracker import TimeTracker
from t5x_like.trainer.watchdog import Watchdog
clock = TimeTracker()
timeouts = TimeoutsConfig(step=3.0)
def ended(code, reason):
    print(code, reason, flush=True)
def require():
    {require}
watchdog = Watchdog(timeouts, clock, pathlib.Path(sys.argv[1]), ended, require)
clock.enter("step")
def hangs_here():
    threading.Event().wait(100)
for _ in range(4):
    time.sleep(1.0)
    with clock.state("data_wait"):
        pass
print("alive", flush=True)
{end}
"""


def run(end: str, stacks: Path, require: str = "pass") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT.format(end=end, require=require), str(stacks)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_hung_process_ends_with_its_stacks_and_a_code_that_restarts_it(tmp_path: Path) -> None:
    result = run("hangs_here()", tmp_path / "stacks.0.txt")
    assert result.returncode == EXIT_RESUMABLE
    assert "alive" in result.stdout and "the stage 'step' takes longer than 3 seconds" in result.stdout
    for text in (result.stderr, (tmp_path / "stacks.0.txt").read_text()):
        assert "in hangs_here" in text and "takes longer than 3 seconds" in text


def test_a_hung_process_whose_run_directory_is_gone_ends_with_a_code_that_does_not_restart_it(tmp_path: Path) -> None:
    gone = 'from t5x_like.errors import SafetyError; raise SafetyError("the directory is gone")'
    result = run("hangs_here()", tmp_path / "stacks.0.txt", gone)
    assert result.returncode == EXIT_REFUSED
    assert f"{EXIT_REFUSED} the stage 'step' takes longer" in result.stdout and "the directory is gone" in result.stdout


@pytest.mark.slow
def test_another_stage_has_its_own_limit_and_closing_ends_nothing(tmp_path: Path) -> None:
    """The stage of a save may take longer than a step; a closed watchdog does nothing."""
    result = run('clock.enter("save"); time.sleep(5); watchdog.close(); time.sleep(4)', tmp_path / "stacks.0.txt")
    assert (result.returncode, result.stdout) == (0, "alive\n")
    assert not (tmp_path / "stacks.0.txt").exists()


def test_every_state_of_the_clock_has_a_limit() -> None:
    assert stage_limits(TimeoutsConfig()).keys() == set(STATES)
    assert all(limit is not None for limit in stage_limits(TimeoutsConfig()).values())


@pytest.mark.parametrize("longest", [1.0, 30.0, 80.0])
def test_limit_of_a_step_follows_from_the_longest_measured_one(tmp_path: Path, longest: float) -> None:
    now = 0.0
    clock = TimeTracker(now=lambda: now)
    watchdog = Watchdog(
        TimeoutsConfig(step=1000.0, measured_factor=20.0), clock, tmp_path / "s", lambda code, reason: None
    )
    try:
        for visit in range(MEASURED_VISITS):
            assert watchdog.limit("step") == 1000.0
            with clock.state("step"):
                now += longest if visit == 3 else 0.5
        assert watchdog.limit("step") == {1.0: FLOORS["step"], 30.0: 600.0, 80.0: 1000.0}[longest]
        assert watchdog.limit("compile") == TimeoutsConfig().compile
    finally:
        watchdog.close()


def test_an_import_that_hangs_ends_with_its_stacks(tmp_path: Path) -> None:
    """The command is limited from its start: here jax's import never returns."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("import threading\nthreading.Event().wait(60)\n")
    command = [sys.executable, "-m", "t5x_like", "train", "smoke", "--workdir", "run", "--timeouts.start", "2"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == EXIT_RESUMABLE, result.stderr
    (stacks,) = (tmp_path / "run").glob("stacks.*.txt")
    assert "jax/__init__.py" in stacks.read_text()
    exit_record = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert exit_record["code"] == EXIT_RESUMABLE and "the start takes longer than 2 seconds" in exit_record["reason"]


HOLDS_THE_LOCK = """
import ctypes
from t5x_like.trainer import stacks
stacks._DUMP_SECONDS = 2.0
stacks.end_later(600.0)
stacks.end_later(3.0)
def holds_the_lock():
    ctypes.PyDLL(None).sleep({seconds})
holds_the_lock()
stacks.end_later(None)
ctypes.PyDLL(None).sleep(7)
print("alive")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no such timer")
@pytest.mark.parametrize("seconds, code, output", [(600, EXIT_RESUMABLE, ""), (0, 0, "alive\n")])
def test_an_interpreter_that_runs_no_thread_ends_with_the_code_that_restarts_it(
    seconds: int, code: int, output: str
) -> None:
    """A call that holds the interpreter's lock forever stops the watchdog, and not the timer of the C library."""
    command = [sys.executable, "-c", HOLDS_THE_LOCK.format(seconds=seconds)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (code, output)
    assert ("in holds_the_lock" in result.stderr) == (code != 0)
