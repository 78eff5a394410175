"""`generate --output` killed at random points: the same command ends with the file of an undisturbed one."""

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

import prompted
import pytest

from t5x_like.config import EXIT_OK, EXIT_REFUSED, EXIT_RESUMABLE

REPOSITORY = Path(__file__).parents[2]
ROWS, SAMPLES = 41, 2
OPTIONS = ("--max-new-tokens", "12", "--temperature", "1.5", "--num-samples", str(SAMPLES), "--batch-size", "4")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("generate")
    prompted.make_run(directory)
    rng = random.Random(1)
    rows = [{"prompt": "".join(rng.choices("abcdefgh ", k=rng.randint(1, 30))), "id": row} for row in range(ROWS)]
    rows[5]["prompt"], rows[6]["seed"] = "ab<mask>cd<mask>", 7
    (directory / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def start(place: Path, output: str, *options: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = ["generate", place / "run", "--input", place / "in.jsonl", "--output", place / output, *OPTIONS, *options]
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
def undisturbed(place):
    finish(start(place, "whole.jsonl"))
    text = (place / "whole.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [(row["id"], row["sample"]) for row in rows] == [(row, s) for row in range(ROWS) for s in range(SAMPLES)]
    assert len({row["output"] for row in rows}) > ROWS
    assert len(rows[10]["spans"]) == 2 and "spans" not in rows[12]
    return text


def test_killed_at_random_points_each_row_is_there_once(place, undisturbed):
    """Five kills: at a random moment after a random number of lines; twice with a line torn, as by a full disk."""
    rng = random.Random(2)
    output = place / "killed.jsonl"
    for kill in range(5):
        process = start(place, output.name)
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
    finish(start(place, output.name))
    assert output.read_text() == undisturbed
    assert "82 lines" in finish(start(place, output.name)), "nothing is left to do"
    assert output.read_text() == undisturbed


def test_other_settings_are_refused_and_a_newer_checkpoint_is_not_taken(place, undisturbed):
    output = place / "settings.jsonl"
    process = start(place, output.name, "--step", "3")
    while process.poll() is None and count(output) < 1:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    said = finish(process, EXIT_RESUMABLE)
    assert "the same command goes on" in said and 0 < count(output) < ROWS * SAMPLES
    kept = output.read_text()
    assert "settings.sampling.temperature: 1.5 there, 2.0 now" in finish(
        start(place, output.name, "--temperature", "2"), EXIT_REFUSED
    )
    assert "step: 3 there, 5 now" in finish(start(place, output.name, "--step", "5"), EXIT_REFUSED)
    assert output.read_text() == kept
    finish(start(place, output.name))  # Step 5 is the newest; the lines that are there are of step 3.
    assert json.loads((place / "settings.jsonl.settings.json").read_text())["step"] == 3
    assert output.read_text() == undisturbed, "both checkpoints hold the same numbers"


def test_two_processes_share_the_prompts_and_are_killed(place, undisturbed):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    output = place / "shared.jsonl"

    def both() -> list[subprocess.Popen[str]]:
        flags = ("--coordinator", address, "--num-processes", "2", "--process-id")
        return [start(place, output.name, *flags, str(index)) for index in range(2)]

    processes = both()
    while all(process.poll() is None for process in processes) and not list(place.glob("shared.jsonl.part-*")):
        time.sleep(0.01)
    deadline = time.monotonic() + 200
    while not any(count(part) for part in place.glob("shared.jsonl.part-?-of-2")) and time.monotonic() < deadline:
        time.sleep(0.002)
    for process in processes:
        process.kill()
        process.communicate()
    assert not output.exists()
    for process in both():
        finish(process)
    assert output.read_text() == undisturbed
    left = sorted(file.name for file in place.glob("shared.jsonl*"))
    assert left == ["shared.jsonl", "shared.jsonl.settings.json"]
