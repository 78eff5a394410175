"""A run that begins from another model: its first step has those parameters, and to resume it does not need them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config import (
    Adafactor,
    AdamW,
    CheckpointConfig,
    ConfigError,
    CorpusConfig,
    DataConfig,
    EvaluationConfig,
    Freeze,
    InitializeFrom,
    ModelConfig,
    MonitoringConfig,
    PrefixLM,
    RunConfig,
    Schedule,
    StackConfig,
    TokenizerConfig,
    TrainingConfig,
)
from t5x_like.config.adaptation import ALL_BUT_CROSS_ATTENTION, encoder_decoder_of_decoder
from t5x_like.data.prepare import prepare
from t5x_like.interop import imported
from t5x_like.interop.adaptation import initial_state
from t5x_like.models.build import abstract, build
from t5x_like.program import assemble
from t5x_like.run_directory import CHECKPOINTS, read_config
from t5x_like.trainer import train

pytestmark = pytest.mark.slow

STACK = StackConfig(num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=32, positions="rope")
SOURCE = ModelConfig(encoder=None, decoder=STACK, vocab_size=260, tie_embeddings=True)


def run_in(place: Path, steps: int) -> RunConfig:
    """T5Gemma's warm-up: a fresh cross-attention trains alone for two steps."""
    return RunConfig(
        name="adapted",
        model=dataclasses.replace(SOURCE, encoder=STACK, vocab_size=384),
        data=DataConfig(
            corpus=CorpusConfig(packages=False, max_documents=8, validation_fraction=0.2),
            tokenizer=TokenizerConfig(kind="bytes", num_sentinels=4),
            layout="encoder_decoder",
            mixture=(PrefixLM(name="S"),),
            inputs_length=32,
            targets_length=32,
            store=str(place / "stores"),
        ),
        training=TrainingConfig(
            num_train_steps=steps,
            batch_size=8,
            optimizer=AdamW(),
            schedule=Schedule(kind="constant", learning_rate=1e-2, warmup_steps=0),
            freeze=(Freeze(paths=(ALL_BUT_CROSS_ATTENTION,), until_step=2),),
        ),
        initialize_from=encoder_decoder_of_decoder(
            str(place / "source"), cross_attention="fresh", separate_tables=False, grow=("token_embedder/embedding",)
        ),
        checkpoints=CheckpointConfig(save_every_steps=100, keep_last=9),
        evaluation=EvaluationConfig(num_batches=1),
        monitoring=MonitoringConfig(tensorboard=False, samples=0),
    )


def saved(run: RunConfig, directory: Path, step: int) -> dict[str, np.ndarray]:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract(run.model).params
    )
    manager = CheckpointManager(directory / CHECKPOINTS, run.checkpoints, read_only=True)
    leaves = jax.tree_util.tree_leaves_with_path(manager.restore_params(wanted, step)[1])
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def test_it_begins_there_and_goes_on_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = build(SOURCE, jax.random.key(5))
    (tmp_path / "source").mkdir()
    imported.save(tmp_path / "source", SOURCE, None, {"params": old})
    run = run_in(tmp_path, 1)
    prepare(run.data, report=lambda line: None)

    elsewhere = dataclasses.replace(run, model=dataclasses.replace(run.model, encoder=None))
    elsewhere = dataclasses.replace(elsewhere, data=dataclasses.replace(run.data, layout="prefix_lm"))
    with pytest.raises(ConfigError, match=r"initialize_from.rules.1"):
        train(elsewhere, tmp_path / "refused")

    assert train(run, tmp_path / "run") == 0
    shown = capsys.readouterr().out
    assert "encoder/layers/mlp/wo/kernel" in shown and "from decoder/layers/mlp/wo/kernel" in shown
    assert "fresh" in shown and "grown from (260, 32)" in shown
    assert read_config(tmp_path / "run").initialize_from == run.initialize_from
    first = saved(run, tmp_path / "run", 1)
    table = np.asarray(old["token_embedder"]["embedding"])
    np.testing.assert_array_equal(first["token_embedder/embedding"][:260], table)
    kernel = np.asarray(old["decoder"]["layers"]["mlp"]["wo"]["kernel"])
    np.testing.assert_array_equal(first["encoder/layers/mlp/wo/kernel"], kernel)

    shutil.rmtree(tmp_path / "source")
    longer = run_in(tmp_path, 3)
    assert train(longer, tmp_path / "run") == 0
    assert "parameters of step" not in capsys.readouterr().out
    last = saved(run, tmp_path / "run", 3)
    # The warm-up is over: everything has moved.
    assert not [path for path in last if np.array_equal(last[path], first[path])]


def test_the_optimizer_goes_on_too(tmp_path: Path) -> None:
    """What `convert --from t5x --optimizer` writes, in a run of the same model."""
    run = run_in(tmp_path, 1)
    training = dataclasses.replace(run.training, optimizer=Adafactor(min_dim_size_to_factor=16), freeze=())
    source = InitializeFrom(directory=str(tmp_path / "source"), optimizer=True)
    run = dataclasses.replace(run, training=training, initialize_from=source)
    program = assemble(run, jax.devices())
    state = jax.tree.map(
        lambda leaf: np.random.default_rng(leaf.size).integers(1, 9, leaf.shape).astype(leaf.dtype),
        {name: program.abstract_state[name] for name in ("params", "opt_state")},
    )
    (tmp_path / "source").mkdir()
    imported.save(tmp_path / "source", run.model, None, state)
    found = initial_state(program, lambda line: None)
    jax.tree.map(np.testing.assert_array_equal, {name: found[name] for name in state}, state)
    assert found["step"] == 0
    jax.tree.map(lambda leaf, wanted: leaf.sharding == wanted.sharding or pytest.fail(), found, program.abstract_state)
