"""`eval --follow` is killed at random times and started again: each row and each step is computed exactly once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import evaluated_run

from t5x_like.errors import EXIT_RESUMABLE

pytestmark = pytest.mark.slow

STEPS = (3, 5, 8)
TESTS = Path(__file__).parents[1]
ECC = "INTERNAL: CUDA error: CUDA_ERROR_ECC_UNCORRECTABLE: uncorrectable ECC error encountered"
# The command line, in a process whose device fails when the parameters of the model are loaded.
FAILING_DEVICE = """
import sys
import jax
from t5x_like import model_loading
from t5x_like.cli.main import entry

def fail(*arguments, **options):
    raise jax.errors.JaxRuntimeError(MESSAGE)

model_loading.LoadedModel.params = fail
entry()
"""
TASK = ("--task", "reverse", "--module", "helpers.evaluated_run", "--no-intervals")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluated_run.make(tmp_path_factory.mktemp("evaluated"), STEPS)


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}


def started(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "t5x_like", *arguments]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)


def killed_when(condition: Callable[[], bool], *arguments: str) -> bool:
    """Run a command, and kill it as soon as the condition holds. Return True if it was killed; otherwise it must have
    succeeded."""
    process = started(*arguments)
    try:
        while process.poll() is None:
            if condition():
                process.send_signal(signal.SIGKILL)
                process.wait()
                return True
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    return False


def lines(path: Path) -> list[dict]:
    """Return the complete lines of a file that another process may be writing."""
    text = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith(b"\n")]


def test_each_row_and_each_step_is_computed_once_despite_kills(run_dir):
    """Kills during the predictions of one step, during the scores of another, and at random times."""
    folder = run_dir / "evaluations"
    chance = random.Random(0)

    def answered() -> int:
        return sum(len(lines(path)) for path in folder.glob("*/reverse.*.partial"))

    def recorded() -> int:
        return len(lines(run_dir / "evaluations.jsonl"))

    command = ["eval", str(run_dir), "--follow", *TASK]

    def killed_after(rows: int, evaluated: int) -> bool:
        late = time.monotonic() + chance.uniform(30, 120)
        return killed_when(
            lambda: answered() >= rows or recorded() > evaluated or time.monotonic() > late,
            *command,
        )

    kills = rows_before = evaluated_before = 0
    while kills < 3 and killed_after(rows_before + chance.randrange(1, 80), evaluated_before):
        kills += 1
        assert answered() >= rows_before or recorded() > evaluated_before, "a kill lost a row"
        rows_before, evaluated_before = answered(), recorded()
    assert kills, "the process was never killed"
    assert not killed_when(lambda: False, *command)
    result = lines(run_dir / "evaluations.jsonl")
    assert [record["step"] for record in result] == list(STEPS)
    for record in result:
        rows = lines(folder / str(record["step"]) / "reverse.jsonl")
        assert [row["index"] for row in rows] == list(range(evaluated_run.EXAMPLES))
        assert record["tasks"]["reverse"]["examples"] == evaluated_run.EXAMPLES
        assert record["tasks"]["reverse"]["said"] == len({row["prediction"] for row in rows})
        assert record["tasks"]["reverse"]["score"] == pytest.approx(sum(row["score"] for row in rows) / len(rows))
        same = {row["inputs"]: row["prediction"] for row in rows}
        assert all(row["prediction"] == same[row["inputs"]] for row in rows), (
            "equal examples must have equal predictions"
        )
    assert not list(folder.glob("*/*.partial"))
    assert len({record["tasks"]["reverse"]["score"] for record in result}) == len(STEPS), (
        "each step must be scored with its own parameters"
    )

    # An uninterrupted evaluation of a recorded step gives the same results.
    output = run_dir.parent / "again.json"
    again = ["eval", f"{run_dir}:5", *TASK]
    assert not killed_when(lambda: False, *again, "--output", str(output))
    uninterrupted = json.loads(output.read_text())
    checks = ("previous_step", "crc32")  # Of the line in evaluations.jsonl.
    assert uninterrupted == {name: value for name, value in result[1].items() if name not in checks}


@pytest.mark.parametrize("command", [["eval"], ["generate", "--prompt", "red green"]], ids=["eval", "generate"])
def test_failed_device_ends_a_command_with_the_code_of_a_restart(run_dir: Path, command: list[str]) -> None:
    code = FAILING_DEVICE.replace("MESSAGE", repr(ECC))
    argv = [sys.executable, "-c", code, command[0], str(run_dir), *command[1:]]
    result = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == EXIT_RESUMABLE, result.stderr
    assert f"t5x-like: a device failed ({ECC}). The same command resumes." in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.harness
def test_lm_eval_computes_each_request_once_despite_kills(run_dir):
    pytest.importorskip("lm_eval", reason="the extra harness is not installed; `make test-harness` installs it")
    command = ["lm-eval", str(run_dir), "--heldout-multiple-choice"]
    chance = random.Random(1)

    def answered() -> int:
        return sum(len(lines(path)) for path in (run_dir / "lm_eval").glob("8-*.jsonl"))

    def killed_after(rows: int) -> bool:
        return killed_when(lambda: answered() >= rows, *command)

    before = 0
    for _ in range(2):
        if killed_after(before + chance.randrange(1, 60)):
            assert answered() >= before
            before = answered()
    assert before, "the process was never killed"
    assert not killed_when(lambda: False, *command)
    (path,) = (run_dir / "lm_eval").glob("8-*.jsonl")
    keys = [row["key"] for row in lines(path)[1:]]
    assert len(keys) == len(set(keys)) >= before - 1
    asked = path.read_bytes()
    assert not killed_when(lambda: False, *command)
    assert path.read_bytes() == asked, "nothing is asked again"
