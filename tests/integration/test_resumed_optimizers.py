"""A run with each optimizer, resumed from a checkpoint, ends with the state of the undisturbed run, bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from helpers.saved_state import saved_state
from helpers.small_run import small_run

from t5x_like.config import (
    AdafactorConfig,
    CausalLM,
    CheckpointConfig,
    CompilationCacheConfig,
    LambConfig,
    LearningRateGroup,
    MuonConfig,
    OptaxOptimizer,
    OptimizerConfig,
    ScheduleFreeConfig,
)
from t5x_like.data.store.prepare import prepare
from t5x_like.errors import EXIT_OK
from t5x_like.trainer.train import train

pytestmark = pytest.mark.slow
OPTIMIZERS = {
    "muon": MuonConfig(),
    "lion": OptaxOptimizer(factory="lion"),
    "lamb": LambConfig(),
    "schedule_free": ScheduleFreeConfig(),
    "adafactor": AdafactorConfig(momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_run_is_resumed_bit_for_bit(name: str, tmp_path: Path) -> None:
    optimizer: OptimizerConfig = OPTIMIZERS[name]
    run = small_run(
        tmp_path,
        "causal_lm",
        [CausalLM(name="text")],
        lengths=(0, 32),
        training={
            "optimizer": optimizer,
            "learning_rate_groups": (LearningRateGroup(paths=("token_embedder/.*",), factor=0.5),),
        },
        checkpoints=CheckpointConfig(save_every_steps=2),
        compilation_cache=CompilationCacheConfig(directory=str(tmp_path / "compiled")),
    )
    prepare(run.data, report=lambda line: None)
    shorter = dataclasses.replace(run, training=dataclasses.replace(run.training, num_train_steps=2))
    assert train(run, tmp_path / "undisturbed") == EXIT_OK
    assert train(shorter, tmp_path / "resumed") == EXIT_OK
    assert train(run, tmp_path / "resumed") == EXIT_OK
    at_two, undisturbed, resumed = (
        {path: leaf.tobytes() for path, leaf in saved_state(tmp_path / workdir, step).items()}
        for workdir, step in (("resumed", 2), ("undisturbed", 4), ("resumed", 4))
    )
    assert resumed == undisturbed
    # The state of the optimizer moves with the steps, so that a state made anew would differ.
    moments = [path for path in resumed if path.startswith("opt_state/") and resumed[path] != at_two[path]]
    assert len(moments) >= 5
