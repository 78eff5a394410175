"""A run with parameters in bfloat16: its checkpoints hold them, and every command reads the same values in float32."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.saved_state import saved_state
from helpers.small_run import small_run

from t5x_like.cli.main import main
from t5x_like.config import CausalLM, CheckpointConfig, CompilationCacheConfig, InitializeFrom
from t5x_like.data.store.prepare import prepare
from t5x_like.errors import EXIT_OK
from t5x_like.interop.warm_start import initial_state
from t5x_like.model_loading import open_model
from t5x_like.program import build_program
from t5x_like.run_directory import read_config
from t5x_like.trainer.train import train
from t5x_like.utils import tree_paths
from t5x_like.utils.type_aliases import PyTree

pytestmark = pytest.mark.slow


def arrays(params: PyTree) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in tree_paths.by_path(params).items()}


def test_commands_read_what_was_trained(tmp_path: Path) -> None:
    run = small_run(
        tmp_path,
        "causal_lm",
        [CausalLM(name="text")],
        lengths=(0, 32),
        training={"num_train_steps": 2, "parameter_type": "bfloat16"},
        checkpoints=CheckpointConfig(save_every_steps=1),
        compilation_cache=CompilationCacheConfig(directory=str(tmp_path / "compiled")),
    )
    prepare(run.data, report=lambda line: None)
    trained = tmp_path / "run"
    assert train(run, trained) == EXIT_OK
    state = saved_state(trained, 2)
    saved = {path.removeprefix("params/"): x for path, x in state.items() if path.startswith("params/")}
    assert {x.dtype for x in saved.values()} == {jnp.dtype(jnp.bfloat16)}
    expected = {path: x.astype(np.float32) for path, x in saved.items()}

    def require_expected(found: dict[str, np.ndarray], dtype: str = "float32") -> None:
        assert {x.dtype for x in found.values()} == {jnp.dtype(dtype)} and found.keys() == expected.keys()
        for path, x in found.items():
            np.testing.assert_array_equal(x.astype(np.float32), expected[path])

    require_expected(arrays(open_model(trained).params()[1]))
    assert main(["eval", str(trained), "--output", str(tmp_path / "scores.json")]) == EXIT_OK
    scores = [json.loads(path.read_text()) for path in (tmp_path / "scores.json", trained / "evaluation.json")]
    numbers = [[x for x in jax.tree.leaves(each["objectives"]) if isinstance(x, float)] for each in scores]
    assert numbers[0]
    np.testing.assert_allclose(*numbers, rtol=1e-5)

    assert main(["convert", "--to", "hf", str(trained), str(tmp_path / "hf")]) == EXIT_OK
    assert main(["convert", "--from", "hf", str(tmp_path / "hf"), str(tmp_path / "back")]) == EXIT_OK
    require_expected(arrays(open_model(tmp_path / "back").params()[1]))

    assert main(["average", str(trained), str(tmp_path / "mean")]) == EXIT_OK
    assert read_config(tmp_path / "mean").training.parameter_type == "float32"
    before = arrays(open_model(f"{trained}:1").params()[1])
    for path, x in arrays(open_model(tmp_path / "mean").params()[1]).items():
        np.testing.assert_array_equal(x, (before[path] + expected[path]) / 2)

    for kind in ("float32", "bfloat16"):
        later = dataclasses.replace(
            run,
            training=dataclasses.replace(run.training, parameter_type=kind),
            initialize_from=InitializeFrom(directory=str(trained)),
        )
        state = initial_state(build_program(later, jax.devices()[:1]), lambda line: None)
        require_expected(arrays(state["params"]), kind)
