"""`t5x-like study`, end to end: killed, continued, extended by a seed and an arm, refused when an arm has changed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.config_examples import REPOSITORY

from t5x_like.cli.main import main
from t5x_like.errors import EXIT_OK, EXIT_RESUMABLE, EXIT_USAGE
from t5x_like.evaluation.results_store import read_evaluations
from t5x_like.studies import runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CEILING = 37 / 48
TINY = f"""
import dataclasses, importlib.util
from t5x_like.studies.study import Arm, Budget

spec = importlib.util.spec_from_file_location("shipped", {str(REPOSITORY / "configs/studies/labels_in_place.py")!r})
shipped = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shipped)
STEPS, ARMS = 30, ("causal", "encoder")


def study(tier, folder):
    found = shipped.study(tier, folder)
    arms = []
    for name in ARMS:
        run = found.arm(name).run
        evaluation = dataclasses.replace(run.evaluation, every_steps=10)
        checkpoints = dataclasses.replace(run.checkpoints, save_every_steps=10)
        arms.append(Arm(name, dataclasses.replace(run, evaluation=evaluation, checkpoints=checkpoints)))
    predictions = tuple(one for one in found.predictions if {{one.arm, one.than}} <= {{*ARMS, None}})
    return dataclasses.replace(
        found, arms=tuple(arms), seeds=(0,), budget=Budget("steps", STEPS), predictions=predictions
    )
"""


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Run the commands of a study in this process, which is faster than one process each, and record them."""
    found: list[list[str]] = []

    def run(arguments: list[str]) -> int:
        found.append(list(arguments))
        return main(arguments)

    monkeypatch.setattr(runs, "run_command", run)
    return found


def steps_compiled(workdir: Path) -> set[str]:
    """Return the names of the training steps in the compilation cache of a study."""
    return {path.name for path in (workdir / "compilation_cache").glob("*/jit_train-*-cache")}


def test_a_study_that_is_killed_goes_on(
    tmp_path: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    file, workdir = tmp_path / "tiny.py", tmp_path / "study"
    file.write_text(TINY)
    words = ["study", str(file), "--workdir", str(workdir)]
    assert main([*words, "--plan"]) == EXIT_OK and not workdir.exists()
    assert "2 runs of 2 arms" in capsys.readouterr().out

    process = subprocess.Popen([sys.executable, "-m", "t5x_like", *words], stdout=subprocess.DEVNULL)
    first = workdir / "causal.seed-0"
    deadline = time.monotonic() + 600
    while not list(first.glob("checkpoints/10*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=600) == EXIT_RESUMABLE
    assert not (workdir / "encoder.seed-0").exists() and not (workdir / "study.html").exists()

    assert main(words) == EXIT_OK
    # The run that was killed goes on from its checkpoint, and the other one begins.
    assert [command[0] for command in commands] == ["train", "train", "eval"]
    steps = [record["step"] for record in map(json.loads, (first / "metrics.jsonl").read_text().splitlines())]
    assert steps == sorted(set(steps)) and steps[-1] == 30
    out = capsys.readouterr().out
    assert out.count("no verdict: ") == 4
    page = (workdir / "study.html").read_text()
    # What was expected comes before the result, and what the study cannot show is there.
    order = [page.index(f"<h2>{title}</h2>") for title in ("Expected", "Arms", "Result", "What this cannot show")]
    assert order == sorted(order) and str(tmp_path) not in page.replace(str(file), "")
    assert page.count('class="raw"') == 0 and page.count("<figure") == 3

    commands.clear()
    compiled = steps_compiled(workdir)
    assert main([*words, "--seeds", "0", "1"]) == EXIT_OK
    trained = [Path(command[command.index("--workdir") + 1]).name for command in commands if command[0] == "train"]
    assert sorted(trained) == ["causal.seed-1", "encoder.seed-1"]
    assert [command[0] for command in commands][-1] == "eval"
    # The steps that were compiled for the first seed serve the second one.
    assert compiled and steps_compiled(workdir) == compiled
    assert (workdir / "study.html").read_text().count('class="raw"') == 6

    # No model can be above the ceiling: the held-out texts before a cue are the same for both labels.
    for name in ("causal.seed-0", "causal.seed-1"):
        accuracy = read_evaluations(workdir / name)[30]["objectives"]["labels"]["accuracy"]
        assert 0.4 < accuracy <= CEILING + 1e-9

    commands.clear()
    file.write_text(TINY.replace("STEPS, ARMS = 30", "STEPS, ARMS = 40"))
    assert main(words) == EXIT_USAGE and not commands
    assert re.search(r"training\.num_train_steps: found 40, expected 30", capsys.readouterr().err)
    file.write_text(TINY.replace('"encoder")', '"encoder", "prefix")'))
    assert main([*words, "--only", "prefix"]) == EXIT_OK
    assert [Path(command[command.index("--workdir") + 1]).name for command in commands if command[0] == "train"] == [
        "prefix.seed-0"
    ]
    commands.clear()
    os.utime(workdir / "study.html", (0, 0))
    assert main([*words, "--report"]) == EXIT_OK and not commands
    assert (workdir / "study.html").stat().st_mtime > 0
    assert "prefix" in (workdir / "study.html").read_text()
