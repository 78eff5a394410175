"""Preference training and distillation that are interrupted end with the same state, bit for bit.

`test_preference_training.py` and `test_distillation.py` have the cases of a decoder that is trained as a whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.small_run import small_run

from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.cli.main import main
from t5x_like.config import CausalLM, CheckpointConfig, PrefixLM
from t5x_like.data.sources.python_docs import read_all
from t5x_like.data.store.prepare import prepare
from t5x_like.errors import EXIT_OK
from t5x_like.model_loading import open_model
from t5x_like.trainer.train import train

pytestmark = [pytest.mark.slow, pytest.mark.extended]
STEPS = 4


@pytest.fixture(scope="module", params=["encoder_decoder", "decoder"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model after one step, and preference pairs: a docstring goes on, or its letters are exchanged."""
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "decoder":
        run = small_run(root, "causal_lm", (CausalLM(),), training={"num_train_steps": 1}, name="base")
    else:
        run = small_run(root, "encoder_decoder", (PrefixLM(name="S"),), training={"num_train_steps": 1}, name="base")
    prepare(run.data, report=lambda line: None)
    assert train(run, root / "base") == EXIT_OK
    sources = sorted(Path(json.__file__).parents[1].glob("*.py"))[:20]
    texts = sorted({" ".join(text.split()) for found in read_all(sources) for text in found if len(text) > 60})[:60]
    pairs = [{"prompt": f"{text[:20]}:", "chosen": f"a{text[20:38]}", "rejected": text[37:19:-1]} for text in texts]
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return root


def command(folder: Path, task: str, *, lora: bool) -> list[str]:
    base = str(folder / "base")
    match task:
        case "preferences":
            options = ["finetune:dpo", "--from", base, "--data.corpus.files", str(folder / "pairs.jsonl")]
            options += ["--data.store-dir", str(folder / "stores"), "--data.mixture.0.pairs-per-row", "2"]
            options += ["--data.inputs-length", "48", "--data.targets-length", "40"]
            # With adapters, the base is the start model.
            options += ["--initialize-from", "None"] if lora else []
        case "distillation":
            options = [f"{base}/config.json", "--training.distillation.teacher", base]
        case _:
            raise AssertionError(task)
    if lora:
        options += ["--training.lora.base", base, "--training.lora.rank", "4"]
    options += ["--training.schedule.kind", "constant", "--training.schedule.learning-rate", "3e-3"]
    options += ["--checkpoints.save-every-steps", "2", "--monitoring.num-decoded-samples", "0"]
    return ["train", *options, "--compilation-cache.directory", str(folder / "programs")]


def state_of(directory: Path) -> Any:
    program = open_model(directory).program
    manager = CheckpointManager(directory / "checkpoints", CheckpointConfig(), read_only=True)
    return jax.tree.map(np.asarray, manager.restore(program.abstract_state, STEPS)[1])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("task", ["preferences", "distillation"])
def test_an_interrupted_run_ends_with_the_same_bits(folder: Path, task: str, lora: bool) -> None:
    states = []
    for name, ends in (("whole", (STEPS,)), ("stopped", (STEPS // 2, STEPS))):
        workdir = folder / f"{task} {lora} {name}"
        for end in ends:
            options = ["--workdir", str(workdir), "--training.num-train-steps", str(end)]
            assert main([*command(folder, task, lora=lora), *options]) == EXIT_OK
        states.append(state_of(workdir))
    jax.tree.map(np.testing.assert_array_equal, *states)
