"""`generate --output` is killed at random times: the same command then writes the file of an uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import prompted_run

from t5x_like.errors import EXIT_OK, EXIT_REFUSED, EXIT_RESUMABLE

REPOSITORY = Path(__file__).parents[2]
ROWS, SAMPLES = 41, 2
OPTIONS = ("--max-new-tokens", "12", "--temperature", "1.5", "--num-samples", str(SAMPLES), "--batch-size", "4")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    directory = tmp_path_factory.mktemp("generate")
    prompted_run.make_run(directory)
    rng = random.Random(1)
    rows = [{"prompt": "".join(rng.choices("abcdefgh ", k=rng.randint(1, 30))), "id": row} for row in range(ROWS)]
    rows[5]["prompt"], rows[6]["seed"] = "ab<mask>cd<mask>", 7
    (directory / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def start(workspace: Path, output: str, *options: str, step: int | None = None) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(workspace / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    model = workspace / "run" if step is None else f"{workspace / 'run'}:{step}"
    command = ["generate", model, "--input", workspace / "in.jsonl", "--output", workspace / output, *OPTIONS, *options]
    return subprocess.Popen(
        [sys.executable, "-m", "t5x_like", *map(str, command)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen[str], code: int = EXIT_OK) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == code, output
    return output


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def uninterrupted(workspace):
    finish(start(workspace, "whole.jsonl"))
    text = (workspace / "whole.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [(row["id"], row["sample"]) for row in rows] == [(row, s) for row in range(ROWS) for s in range(SAMPLES)]
    assert len({row["output"] for row in rows}) > ROWS
    assert len(rows[10]["spans"]) == 2 and "spans" not in rows[12]
    return text


def test_killed_command_resumes_and_writes_each_row_once(workspace, uninterrupted):
    """Five kills at random times after a random number of lines, twice with an incomplete line, as from a full disk."""
    rng = random.Random(2)
    output = workspace / "killed.jsonl"
    for kill in range(5):
        process = start(workspace, output.name)
        enough = count(output) + rng.choice([0, 1, 9, 17])
        deadline = time.monotonic() + 240
        while process.poll() is None and count(output) < enough and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05) if enough else rng.uniform(0, 8))
        process.kill()
        process.communicate()
        if kill % 2 and count(output) < ROWS * SAMPLES:
            with output.open("a") as file:
                file.write('{"prompt": "torn')
    assert 0 < count(output)
    finish(start(workspace, output.name))
    assert output.read_text() == uninterrupted
    assert "82 lines" in finish(start(workspace, output.name)), "the file is complete"
    assert output.read_text() == uninterrupted


def test_other_settings_are_refused_and_the_step_is_kept(workspace, uninterrupted):
    output = workspace / "settings.jsonl"
    process = start(workspace, output.name, step=3)
    while process.poll() is None and count(output) < 1:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    message = finish(process, EXIT_RESUMABLE)
    assert "run the same command again to resume" in message and 0 < count(output) < ROWS * SAMPLES
    kept = output.read_text()
    assert "settings.sampling.temperature: 1.5 in the file, 2.0 now" in finish(
        start(workspace, output.name, "--temperature", "2"), EXIT_REFUSED
    )
    assert "step: 3 in the file, 5 now" in finish(start(workspace, output.name, step=5), EXIT_REFUSED)
    assert output.read_text() == kept
    finish(start(workspace, output.name))  # Step 5 is the newest; the existing lines are of step 3.
    assert json.loads((workspace / "settings.jsonl.settings.json").read_text())["step"] == 3
    assert output.read_text() == uninterrupted, "both checkpoints have the same parameters"


def test_two_killed_processes_resume_and_write_each_row_once(workspace, uninterrupted):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    output = workspace / "shared.jsonl"

    def both() -> list[subprocess.Popen[str]]:
        flags = ("--coordinator", address, "--num-processes", "2", "--process-id")
        return [start(workspace, output.name, *flags, str(index)) for index in range(2)]

    processes = both()
    while all(process.poll() is None for process in processes) and not list(workspace.glob("shared.jsonl.part-*")):
        time.sleep(0.01)
    deadline = time.monotonic() + 200
    while not any(count(part) for part in workspace.glob("shared.jsonl.part-?-of-2")) and time.monotonic() < deadline:
        time.sleep(0.002)
    for process in processes:
        process.kill()
        process.communicate()
    assert not output.exists()
    for process in both():
        finish(process)
    assert output.read_text() == uninterrupted
    left = sorted(file.name for file in workspace.glob("shared.jsonl*"))
    assert left == ["shared.jsonl", "shared.jsonl.settings.json"]
