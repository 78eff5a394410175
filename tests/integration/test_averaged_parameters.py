"""The average of the parameters is evaluated, converted and trained from, and training is resumed, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.saved_state import saved_state
from helpers.small_run import small_run

from t5x_like.cli.main import main
from t5x_like.config import (
    CausalLM,
    CheckpointConfig,
    CompilationCacheConfig,
    EvaluationConfig,
    InitializeFrom,
    MonitoringConfig,
    RunConfig,
)
from t5x_like.data.store.prepare import prepare
from t5x_like.errors import EXIT_OK
from t5x_like.interop.warm_start import initial_state
from t5x_like.model_loading import open_model
from t5x_like.program import build_program
from t5x_like.run_directory import read_config
from t5x_like.trainer.train import train
from t5x_like.utils import tree_paths

pytestmark = pytest.mark.slow

STEPS = 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("averaged")
    run = small_run(
        root,
        "causal_lm",
        [CausalLM(name="text")],
        lengths=(0, 32),
        training={"num_train_steps": STEPS, "ema_decay": 0.9},
        checkpoints=CheckpointConfig(save_every_steps=2),
        evaluation=EvaluationConfig(num_batches=2),
        monitoring=MonitoringConfig(writers=(), num_decoded_samples=0),
        compilation_cache=CompilationCacheConfig(directory=str(root / "compiled")),
    )
    prepare(run.data, report=lambda line: None)
    assert train(run, root / "run") == EXIT_OK
    return root / "run"


def arrays_of(directory: Path) -> dict[str, bytes]:
    """Return the parameters that a command reads from a model directory."""
    _, params = open_model(directory).params()
    return {path: np.asarray(leaf).tobytes() for path, leaf in tree_paths.by_path(jax.device_get(params)).items()}


def test_commands_read_the_average(trained: Path, tmp_path: Path) -> None:
    saved = saved_state(trained, STEPS)
    average = {name.removeprefix("params/"): a.tobytes() for name, a in saved.items() if name.startswith("params/")}
    raw = {name.removeprefix("raw_params/"): a for name, a in saved.items() if name.startswith("raw_params/")}
    assert average.keys() == raw.keys() and all(average[name] != raw[name].tobytes() for name in raw)
    assert arrays_of(trained) == average

    assert main(["eval", str(trained), "--output", str(tmp_path / "scores.json")]) == EXIT_OK
    scores = [json.loads(path.read_text()) for path in (tmp_path / "scores.json", trained / "evaluation.json")]
    assert scores[0]["objectives"] == scores[1]["objectives"] and scores[0]["prefix_lm"] == scores[1]["prefix_lm"]

    assert main(["convert", "--to", "hf", str(trained), str(tmp_path / "hf")]) == EXIT_OK
    assert main(["convert", "--from", "hf", str(tmp_path / "hf"), str(tmp_path / "back")]) == EXIT_OK
    assert arrays_of(tmp_path / "back") == average


@pytest.fixture(scope="module")
def mean(trained: Path) -> Path:
    directory = trained.parent / "mean"
    assert main(["average", str(trained), str(directory), "--last", "3"]) == EXIT_OK
    return directory


def test_mean_of_checkpoints_is_evaluated_and_converted(trained: Path, mean: Path, tmp_path: Path) -> None:
    states = [saved_state(trained, step) for step in (2, 4, STEPS)]
    parameters = arrays_of(mean)
    for name, content in parameters.items():
        first, second, third = (state[f"params/{name}"] for state in states)
        # XLA divides by a constant by multiplying with its reciprocal.
        assert content == ((first + second + third) * (np.float32(1) / np.float32(3))).tobytes(), name

    scores = []
    for model in (mean, mean):
        assert main(["eval", str(model), "--output", str(tmp_path / "scores.json")]) == EXIT_OK
        scores.append(json.loads((tmp_path / "scores.json").read_text())["objectives"])
    assert main(["eval", str(mean)]) == EXIT_OK and main(["eval", str(trained)]) == EXIT_OK
    assert main(["compare", str(trained), str(mean), "--output", str(tmp_path / "page.html")]) == EXIT_OK
    assert "paired: the same examples" in (tmp_path / "page.html").read_text()
    assert scores[0] == scores[1] != json.loads((trained / "evaluation.json").read_text())["objectives"]

    assert main(["convert", "--to", "hf", str(mean), str(tmp_path / "hf")]) == EXIT_OK
    assert main(["convert", "--from", "hf", str(tmp_path / "hf"), str(tmp_path / "back")]) == EXIT_OK
    assert arrays_of(tmp_path / "back") == parameters


def test_run_from_the_mean_is_resumed_with_its_own_average(trained: Path, mean: Path, tmp_path: Path) -> None:
    run = dataclasses.replace(read_config(trained), initialize_from=InitializeFrom(directory=str(mean)))

    def steps(number: int) -> RunConfig:
        return dataclasses.replace(run, training=dataclasses.replace(run.training, num_train_steps=number))

    begin = initial_state(build_program(steps(4), jax.devices()[:1]), lambda line: None)
    found = {path: np.asarray(leaf).tobytes() for path, leaf in tree_paths.by_path(begin["params"]).items()}
    assert found == arrays_of(mean)

    assert train(steps(4), tmp_path / "undisturbed") == EXIT_OK
    for number in (2, 4):
        assert train(steps(number), tmp_path / "resumed") == EXIT_OK
    undisturbed, resumed = (saved_state(tmp_path / name, 4) for name in ("undisturbed", "resumed"))
    assert any(path.startswith("raw_params/") for path in undisturbed)
    assert {path: leaf.tobytes() for path, leaf in resumed.items()} == {
        path: leaf.tobytes() for path, leaf in undisturbed.items()
    }
