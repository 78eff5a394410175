"""Direct preference optimization of real text by the command line: what is learned, kills, and refusals."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.small_run import small_run

from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.cli.main import main
from t5x_like.config import CausalLM, CheckpointConfig
from t5x_like.data.sources.python_docs import read_all
from t5x_like.data.store.prepare import prepare
from t5x_like.data.stream.reference_log_probs import FILE
from t5x_like.errors import EXIT_OK, EXIT_REFUSED
from t5x_like.model_loading import open_model
from t5x_like.trainer.train import train

pytestmark = pytest.mark.slow

STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has hardly learned anything, and pairs: a docstring goes on, or its letters are exchanged."""
    root = tmp_path_factory.mktemp("preferences")
    run = small_run(root, "causal_lm", (CausalLM(),), training={"num_train_steps": 1}, name="base")
    prepare(run.data, report=lambda line: None)
    assert train(run, root / "base") == EXIT_OK
    sources = sorted(Path(json.__file__).parents[1].glob("*.py"))[:40]
    texts = sorted({" ".join(text.split()) for found in read_all(sources) for text in found if len(text) > 60})
    pairs = [{"prompt": text[:20], "chosen": text[20:38], "rejected": text[37:19:-1]} for text in texts[:160]]
    pairs = [pair for pair in pairs if pair["chosen"] != pair["rejected"] and pair["prompt"].strip()]
    assert len(pairs) > 100
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return root


def run_steps(folder: Path, name: str, steps: int, *options: str) -> int:
    command = ["train", "finetune:dpo", "--from", str(folder / "base"), "--workdir", str(folder / name)]
    command += ["--data.corpus.files", str(folder / "pairs.jsonl"), "--data.corpus.validation-fraction", "0.25"]
    # Two pairs share a row.
    command += ["--data.store-dir", str(folder / "stores"), "--data.inputs-length", "44"]
    command += ["--data.targets-length", "40", "--data.mixture.0.pairs-per-row", "2"]
    command += ["--training.num-train-steps", str(steps)]
    command += ["--training.schedule.kind", "constant", "--training.schedule.learning-rate", "3e-3"]
    command += ["--checkpoints.save-every-steps", "20", "--monitoring.log-every-steps", "1"]
    # The programs of these runs are the same ones.
    command += ["--compilation-cache.directory", str(folder / "programs")]
    return main([*command, "--monitoring.num-decoded-samples", "0", *options])


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    assert run_steps(folder, "dpo", STEPS, "--monitoring.num-decoded-samples", "1") == EXIT_OK
    return folder / "dpo"


def numbers(directory: Path, step: int) -> dict[str, Any]:
    program = open_model(directory).program
    manager = CheckpointManager(directory / "checkpoints", CheckpointConfig(), read_only=True)
    return jax.tree.map(np.asarray, manager.restore(program.abstract_state, step)[1])


def test_preference_accuracy_rises_and_the_distance_to_the_reference_is_reported(trained: Path) -> None:
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    # The model is its own reference before the first step.
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert records[0]["preference_margin"] == pytest.approx(0, abs=1e-4)
    assert records[0]["kl_to_reference"] == pytest.approx(0, abs=1e-4)
    assert records[-1]["loss"] < 0.4 and records[-1]["preference_accuracy"] > 0.8
    assert records[-1]["chosen_reward"] > records[-1]["rejected_reward"]
    assert abs(records[-1]["kl_to_reference"]) > 0.01
    scores = json.loads((trained / "evaluation.json").read_text())["objectives"]["dpo"]
    assert scores["preference_accuracy"] > 0.8 and "perplexity" not in scores
    assert {"preference_margin", "chosen_reward", "rejected_reward", "kl_to_reference"} <= set(scores)
    lines = [json.loads(line) for line in (trained / FILE).read_text().splitlines()]
    pairs = len((trained.parent / "pairs.jsonl").read_text().splitlines())
    assert sum(len(line["chosen"]) for line in lines[1:]) == pairs
    assert scores["tokens"] == sum(len(line["chosen"]) for line in lines[1:] if line["split"] == "files/validation")


def test_eval_reads_the_reference_of_the_run(trained: Path, tmp_path: Path) -> None:
    during = json.loads((trained / "evaluation.json").read_text())["objectives"]["dpo"]
    assert main(["eval", str(trained), "--output", str(tmp_path / "scores.json")]) == EXIT_OK
    after = json.loads((tmp_path / "scores.json").read_text())["objectives"]["dpo"]
    assert after == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in during.items()}


def test_a_killed_run_continues_bit_for_bit(trained: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first kill is in the middle of a batch of the reference, the second one between two steps."""
    stopped = folder / "stopped"
    stopped.mkdir()
    written = (trained / FILE).read_bytes()
    (stopped / FILE).write_bytes(written[: len(written) // 2])
    assert run_steps(folder, "stopped", 20) == EXIT_OK
    assert (stopped / FILE).read_bytes() == written
    assert run_steps(folder, "stopped", STEPS) == EXIT_OK
    jax.tree.map(np.testing.assert_array_equal, numbers(stopped, STEPS), numbers(trained, STEPS))

    # Training cannot go on with another reference, or without one: the start model is not here any more.
    altered = written.replace(b'"rejected": [-', b'"rejected": [-1', 1)
    for content in (altered, None):
        copied = folder / f"copied {content is None}"
        shutil.copytree(stopped, copied)
        (copied / FILE).unlink()
        if content is not None:
            (copied / FILE).write_bytes(content)
        capsys.readouterr()
        assert run_steps(folder, copied.name, STEPS + 20) == EXIT_REFUSED
        assert (
            "found other log-probabilities than those that the checkpoint was trained with" in capsys.readouterr().err
        )


@pytest.mark.extended
def test_another_start_model_makes_its_own_reference(folder: Path, trained: Path) -> None:
    """A reference that another start model began, before any step was taken, is not continued."""
    begun = folder / "begun"
    begun.mkdir()
    header, *lines = (trained / FILE).read_text().splitlines()
    other = json.dumps(json.loads(header) | {"model": "another"})
    (begun / FILE).write_text("\n".join([other, *lines]) + "\n")
    lora = [
        "--monitoring.num-decoded-samples",
        "1",
        "--initialize-from",
        "None",
        "--training.lora.base",
        str(folder / "base"),
        "--training.lora.rank",
        "4",
    ]
    assert run_steps(folder, "begun", 20, *lora) == EXIT_OK
    again = [json.loads(line) for line in (begun / FILE).read_text().splitlines()]
    assert again[0] == json.loads(header)
    for found, line in zip(again[1:], lines, strict=True):
        assert found["chosen"] == pytest.approx(json.loads(line)["chosen"], rel=1e-5)
    records = [json.loads(line) for line in (begun / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert records[-1]["loss"] < records[0]["loss"] - 0.01

    # The base is still here: a file that was lost is made again.
    (begun / FILE).unlink()
    assert run_steps(folder, "begun", 21, *lora) == EXIT_OK
