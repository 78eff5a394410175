"""A small model that learns from a larger one: better than alone after the same steps, resumed bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.small_run import small_run

from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.cli.main import main
from t5x_like.config import CausalLM, CheckpointConfig, RunConfig, ScheduleConfig
from t5x_like.config.serialization import to_json
from t5x_like.data.store.prepare import prepare
from t5x_like.errors import EXIT_OK, EXIT_REFUSED
from t5x_like.model_loading import open_model
from t5x_like.trainer.train import train

pytestmark = [pytest.mark.slow, pytest.mark.extended]


def run_of(root: Path, steps: int, num_layers: int) -> RunConfig:
    schedule = ScheduleConfig(kind="constant", learning_rate=3e-3, warmup_steps=10)
    return small_run(
        root,
        "causal_lm",
        (CausalLM(),),
        lengths=(0, 64),
        stack={"num_layers": num_layers},
        training={"num_train_steps": steps, "global_batch_size": 16, "schedule": schedule},
        checkpoints=CheckpointConfig(save_every_steps=20),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that has been trained for long, and the recipe of a student."""
    folder = tmp_path_factory.mktemp("distillation")
    run = run_of(folder, 300, 2)
    prepare(run.data, report=lambda line: None)
    assert train(run, folder / "teacher") == EXIT_OK
    (folder / "student.json").write_text(to_json(run_of(folder, 60, 1)))
    return folder


def learn(root: Path, name: str, steps: int, *options: str) -> int:
    command = ["train", str(root / "student.json"), "--workdir", str(root / name)]
    return main([*command, "--training.num-train-steps", str(steps), *options])


def loss(directory: Path) -> float:
    return float(json.loads((directory / "evaluation.json").read_text())["objectives"]["causal_lm"]["loss"])


@pytest.mark.timeout(3600)
def test_students_of_three_seeds_are_better_than_alone() -> None:
    """The students and the steps of docs/finetune.md. At a fifth of these steps, no difference is sure."""
    script = Path(__file__).parents[2] / "benchmarks" / "distillation.py"
    # Long enough for fast machine code to pay.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, script, "--top-k"]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    print(output)
    found = re.search(r"live - alone: (\S+) \+- (\S+), lower for 3 of 3 seeds", output)
    assert found and float(found[1]) + float(found[2]) < 0


def test_a_distilled_student_resumes_bit_for_bit(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = ["--training.distillation.teacher", str(root / "teacher"), "--training.distillation.weight", "0.9"]
    assert learn(root, "distilled", 60, *teacher) == EXIT_OK
    assert loss(root / "teacher") < loss(root / "distilled")
    records = [json.loads(line) for line in (root / "distilled" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["distillation"] < records[0]["distillation"]

    assert learn(root, "stopped", 20, *teacher) == EXIT_OK
    assert learn(root, "stopped", 60, *teacher) == EXIT_OK
    states = []
    for name in ("stopped", "distilled"):
        program = open_model(root / name).program
        manager = CheckpointManager(root / name / "checkpoints", CheckpointConfig(), read_only=True)
        states.append(jax.tree.map(np.asarray, manager.restore(program.abstract_state, 60)[1]))
    jax.tree.map(np.testing.assert_array_equal, *states)

    # Another teacher of the same shape.
    other = dataclasses.replace(run_of(root, 1, 2), name="other")
    assert train(other, root / "other") == EXIT_OK
    capsys.readouterr()
    teacher[1] = str(root / "other")
    assert learn(root, "stopped", 80, *teacher) == EXIT_REFUSED
    assert "from which the run has learned" in capsys.readouterr().err


def test_stored_tokens_of_the_teacher_replace_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokens are made once for the rows of a run, and a run of the same rows continues without the teacher."""
    # A teacher that this test may move.
    shutil.copytree(root / "teacher", root / "moved")
    options = ["--training.distillation.teacher", str(root / "moved"), "--monitoring.log-every-steps", "1"]
    vocabulary = run_of(root, 1, 1).model.vocab_size
    assert learn(root, "live", 10, *options) == EXIT_OK
    assert learn(root, "all", 10, *options, "--training.distillation.top-k", str(vocabulary)) == EXIT_OK
    lines = [(root / name / "metrics.jsonl").read_text().splitlines() for name in ("live", "all")]
    for live, stored in zip(*([json.loads(line) for line in found] for found in lines), strict=True):
        assert stored["distillation"] == pytest.approx(live["distillation"], rel=1e-3)
        assert stored["loss"] == pytest.approx(live["loss"], rel=1e-3)

    options += ["--training.distillation.top-k", "8"]
    capsys.readouterr()
    assert learn(root, "stopped 8", 20, *options) == EXIT_OK
    assert "the teacher's 8 most likely tokens at each target of 320 rows" in capsys.readouterr().out
    folder = next(
        path for path in (root / "stores").glob("teacher-*") if '"top_k": 8' in (path / "header.json").read_text()
    )
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert learn(root, "whole 8", 40, *options) == EXIT_OK
    assert written.items() <= {path.name: path.read_bytes() for path in folder.iterdir()}.items()
    (root / "moved").rename(root / "elsewhere")
    # The configuration of the run knows the model of the teacher.
    again = ["train", str(root / "stopped 8" / "config.json"), "--workdir", str(root / "stopped 8")]
    assert main([*again, "--training.num-train-steps", "40"]) == EXIT_OK
    states = []
    for name in ("stopped 8", "whole 8"):
        program = open_model(root / name).program
        manager = CheckpointManager(root / name / "checkpoints", CheckpointConfig(), read_only=True)
        states.append(jax.tree.map(np.asarray, manager.restore(program.abstract_state, 40)[1]))
    jax.tree.map(np.testing.assert_array_equal, *states)
    # Further rows need the teacher.
    capsys.readouterr()
    assert main([*again, "--training.num-train-steps", "60"]) != EXIT_OK
    assert str(root / "moved") in capsys.readouterr().err
