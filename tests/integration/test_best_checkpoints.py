"""Checkpoints that are kept for their scores, and early stopping, in a whole run that is interrupted and goes on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.saved_state import saved_state
from helpers.small_run import small_run

from t5x_like.config import (
    CausalLM,
    CheckpointConfig,
    CompilationCacheConfig,
    EarlyStopping,
    EvaluationConfig,
    KeepBest,
    MonitoringConfig,
    RunConfig,
)
from t5x_like.data.store.prepare import prepare
from t5x_like.errors import EXIT_OK, ConfigError
from t5x_like.evaluation import results_store
from t5x_like.trainer.train import train

LOSSES = {4: 5.0, 8: 3.0, 12: 4.0, 16: 2.0, 20: 2.5, 24: 2.4, 28: 2.2, 32: 1.0}
"""Scores of the evaluations: after step 16, three in a row are no improvement."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("best")
    run = small_run(
        root,
        "causal_lm",
        [CausalLM(name="text")],
        lengths=(0, 32),
        training={"num_train_steps": 40},
        checkpoints=CheckpointConfig(
            save_every_steps=2, max_to_keep=2, keep_best=KeepBest(metric="loss/text", count=2)
        ),
        evaluation=EvaluationConfig(every_steps=4, early_stopping=EarlyStopping(metric="loss/text", patience=3)),
        monitoring=MonitoringConfig(log_every_steps=2, writers=()),
        compilation_cache=CompilationCacheConfig(directory=str(root / "compiled")),
    )
    prepare(run.data, report=lambda line: None)
    return run


class Evaluations:
    """Evaluations with given scores, one of which fails at first."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.steps: list[int] = []

    def __call__(self, program: Any, params: Any, stores: Any, run_dir: Path, step: int) -> dict[str, Any]:
        if step == self.fails_at:
            self.fails_at = None
            raise RuntimeError("the process ends")
        self.steps.append(step)
        result = {"step": step, "objectives": {"text": {"loss": LOSSES[step]}}}
        results_store.record(run_dir, result)
        return result


def saved_steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


def test_run_keeps_its_best_checkpoints_and_stops_early_also_after_interruptions(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, fails_at in (("undisturbed", None), ("interrupted", 20), ("at_the_end", 28)):
        evaluations = Evaluations(fails_at)
        monkeypatch.setattr("t5x_like.trainer.session.evaluate_and_record", evaluations)
        workdir = tmp_path / name
        if fails_at is not None:
            with pytest.raises(RuntimeError):
                train(run, workdir)
        assert train(run, workdir) == EXIT_OK
        assert evaluations.steps[-1] == 28
        # The best two, and the newest two.
        assert saved_steps(workdir) == [16, 26, 28]
        exit_record = json.loads((workdir / "exit.json").read_text())
        assert (exit_record["code"], exit_record["step"]) == (EXIT_OK, 28)
        assert "loss/text has not improved since step 16, in 3 evaluations" in exit_record["reason"]
        capsys.readouterr()
        assert train(run, workdir) == EXIT_OK
        assert "step 28 of 40 is saved; nothing to train" in capsys.readouterr().out
    states = [saved_state(tmp_path / name, 28) for name in ("undisturbed", "interrupted", "at_the_end")]
    for path, array in states[0].items():
        assert array.tobytes() == states[1][path].tobytes() == states[2][path].tobytes(), path
    # With more patience the same run goes on to its end.
    stopping = EarlyStopping(metric="loss/text", patience=4)
    patient = dataclasses.replace(run, evaluation=dataclasses.replace(run.evaluation, early_stopping=stopping))
    shorter = dataclasses.replace(patient, training=dataclasses.replace(run.training, num_train_steps=32))
    assert train(shorter, tmp_path / "undisturbed") == EXIT_OK
    assert json.loads((tmp_path / "undisturbed" / "exit.json").read_text())["reason"] == "finished"
    assert saved_steps(tmp_path / "undisturbed") == [16, 28, 30, 32]


def test_metric_that_an_evaluation_lacks_is_refused_with_the_known_ones(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("t5x_like.trainer.session.evaluate_and_record", Evaluations())
    keep = KeepBest(metric="f1/text")
    other = dataclasses.replace(run, checkpoints=dataclasses.replace(run.checkpoints, keep_best=keep))
    with pytest.raises(ConfigError, match="found 'f1/text', expected a score of this run's evaluations: loss/text"):
        train(other, tmp_path)
