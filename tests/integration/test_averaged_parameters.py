"""Commands evaluate and convert the average of the parameters, which training evaluates, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.saved_state import saved_state
from helpers.small_run import small_run

from t5x_like.cli.main import main
from t5x_like.config import CausalLM, CheckpointConfig, CompilationCacheConfig, EvaluationConfig, MonitoringConfig
from t5x_like.data.store.prepare import prepare
from t5x_like.errors import EXIT_OK
from t5x_like.model_loading import open_model
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


def test_mean_of_checkpoints_is_evaluated_and_converted(trained: Path, tmp_path: Path) -> None:
    mean = tmp_path / "mean"
    assert main(["average", str(trained), str(mean), "--last", "3"]) == EXIT_OK
    states = [saved_state(trained, step) for step in (2, 4, STEPS)]
    parameters = arrays_of(mean)
    for name, content in parameters.items():
        expected = np.mean([state[f"params/{name}"] for state in states], axis=0, dtype=np.float32)
        found = np.frombuffer(content, np.float32).reshape(expected.shape)
        assert np.allclose(found, expected, rtol=1e-6, atol=1e-7), name

    scores = []
    for model in (mean, mean):
        assert main(["eval", str(model), "--output", str(tmp_path / "scores.json")]) == EXIT_OK
        scores.append(json.loads((tmp_path / "scores.json").read_text())["objectives"])
    assert scores[0] == scores[1] != json.loads((trained / "evaluation.json").read_text())["objectives"]

    assert main(["convert", "--to", "hf", str(mean), str(tmp_path / "hf")]) == EXIT_OK
    assert main(["convert", "--from", "hf", str(tmp_path / "hf"), str(tmp_path / "back")]) == EXIT_OK
    assert arrays_of(tmp_path / "back") == parameters
