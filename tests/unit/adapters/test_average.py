"""The mean of checkpoints is a model directory, and equals the mean that NumPy computes."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.small_run import small_run

from t5x_like import run_directory
from t5x_like.adapters.average import average_directory
from t5x_like.adapters.restore import restore_whole
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.cli.main import main
from t5x_like.config import CausalLM, CheckpointConfig
from t5x_like.errors import EXIT_OK, EXIT_USAGE, ConfigError
from t5x_like.models.factory import abstract_model
from t5x_like.run_directory import RunRecord
from t5x_like.utils import tree_paths


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, np.ndarray]]]:
    """Return the directory of a run with an average, and the parameters of its checkpoints by step and path."""
    directory = tmp_path_factory.mktemp("average") / "run"
    directory.mkdir()
    run = small_run(directory, "causal_lm", (CausalLM(),), training={"ema_decay": 0.9})
    run_directory.claim_config(RunRecord(directory), run)
    rng = np.random.default_rng(0)
    shapes = abstract_model(run.model).params
    manager = CheckpointManager(directory / run_directory.CHECKPOINTS, CheckpointConfig())
    parameters = {}
    for step in (1, 2, 3):
        params = jax.tree.map(lambda leaf: jax.numpy.asarray(rng.standard_normal(leaf.shape), leaf.dtype), shapes)
        parameters[step] = {path: np.asarray(leaf) for path, leaf in tree_paths.by_path(params).items()}
        manager.save(step, {"params": params}, {})
    manager.close()
    return directory, parameters


@pytest.mark.parametrize(("reference", "options", "steps"), [("", ["--last", "2"], (2, 3)), (":3,1", [], (1, 3))])
def test_mean_of_checkpoints(
    saved: tuple[Path, dict[int, dict[str, np.ndarray]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    reference: str,
    options: list[str],
    steps: tuple[int, ...],
) -> None:
    directory, parameters = saved
    assert main(["average", f"{directory}{reference}", str(tmp_path / "out"), *options]) == EXIT_OK
    assert f"mean of the steps {steps[0]}, {steps[1]}" in capsys.readouterr().out
    run = run_directory.read_config(tmp_path / "out")
    step, params, meta = restore_whole(tmp_path / "out", run.model, None)
    assert (step, meta["averaged"], run.training.ema_decay) == (3, list(steps), None)
    for path, leaf in tree_paths.by_path(params).items():
        expected = np.mean([parameters[step][path] for step in steps], axis=0, dtype=np.float32)
        assert np.allclose(leaf, expected, rtol=1e-6, atol=1e-7), path
    assert main(["average", str(directory), str(tmp_path / "out")]) == EXIT_USAGE


def test_mean_of_one_checkpoint_is_refused(
    saved: tuple[Path, dict[int, dict[str, np.ndarray]]], tmp_path: Path
) -> None:
    directory, _ = saved
    with pytest.raises(ConfigError, match="the checkpoint of step 3 only, expected two"):
        average_directory(directory, tmp_path / "out", last=1)
    assert main(["average", str(tmp_path), str(tmp_path / "out")]) == EXIT_USAGE
    assert main(["average", f"{directory}:1,7", str(tmp_path / "out")]) == EXIT_USAGE
    assert not (tmp_path / "out").exists()
