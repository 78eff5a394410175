"""A run that begins from another model: its first step has those parameters, and to resume it does not need them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_run import small_run

from t5x_like.checkpoints import model_dir
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config import (
    AdafactorConfig,
    AdamWConfig,
    CheckpointConfig,
    CorpusConfig,
    FreezeConfig,
    InitializeFrom,
    ModelConfig,
    PrefixLM,
    RunConfig,
    StackConfig,
)
from t5x_like.config.initialization import ALL_BUT_CROSS_ATTENTION, decoder_to_encoder_decoder
from t5x_like.data.store.prepare import prepare
from t5x_like.errors import ConfigError
from t5x_like.interop.warm_start import initial_state
from t5x_like.models.factory import abstract_model, init_params
from t5x_like.program import build_program
from t5x_like.run_directory import CHECKPOINTS, read_config
from t5x_like.trainer.train import train

pytestmark = pytest.mark.slow

STACK = StackConfig(num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=32, positions="rope")
SOURCE = ModelConfig(encoder=None, decoder=STACK, vocab_size=260, tie_embeddings=True)


def run_in(root: Path, steps: int) -> RunConfig:
    """Return a run that adapts a decoder as T5Gemma does: the new cross-attention trains alone for two steps."""
    return small_run(
        root,
        "encoder_decoder",
        (PrefixLM(name="S"),),
        corpus=CorpusConfig(packages=False, max_documents=8, validation_fraction=0.2),
        num_sentinels=4,
        stack={"d_ff": 32},
        model={"vocab_size": 384, "tie_embeddings": True},
        training={
            "num_train_steps": steps,
            "optimizer": AdamWConfig(),
            "freeze": (FreezeConfig(paths=(ALL_BUT_CROSS_ATTENTION,), until_step=2),),
        },
        name="adapted",
        initialize_from=decoder_to_encoder_decoder(
            str(root / "source"), cross_attention="fresh", separate_tables=False, grow=("token_embedder/embedding",)
        ),
        checkpoints=CheckpointConfig(save_every_steps=100, max_to_keep=9),
    )


def saved(run: RunConfig, directory: Path, step: int) -> dict[str, np.ndarray]:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract_model(run.model).params
    )
    manager = CheckpointManager(directory / CHECKPOINTS, run.checkpoints, read_only=True)
    leaves = jax.tree_util.tree_leaves_with_path(manager.restore_params(wanted, step)[1])
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def test_run_starts_from_the_source_and_resumes_without_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = init_params(SOURCE, jax.random.key(5))
    (tmp_path / "source").mkdir()
    model_dir.save(tmp_path / "source", SOURCE, None, {"params": old})
    run = run_in(tmp_path, 1)
    prepare(run.data, report=lambda line: None)

    elsewhere = dataclasses.replace(run, model=dataclasses.replace(run.model, encoder=None))
    elsewhere = dataclasses.replace(elsewhere, data=dataclasses.replace(run.data, layout="prefix_lm"))
    with pytest.raises(ConfigError, match=r"initialize_from.rename_rules.1"):
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


def test_optimizer_state_is_restored_too(tmp_path: Path) -> None:
    """Initialize a run of the same model from the output of `convert --from t5x --optimizer`."""
    run = run_in(tmp_path, 1)
    training = dataclasses.replace(run.training, optimizer=AdafactorConfig(min_dim_size_to_factor=16), freeze=())
    source = InitializeFrom(directory=str(tmp_path / "source"), restore_optimizer=True)
    run = dataclasses.replace(run, training=training, initialize_from=source)
    program = build_program(run, jax.devices())
    state = jax.tree.map(
        lambda leaf: jnp.asarray(np.random.default_rng(leaf.size).integers(1, 9, leaf.shape), leaf.dtype),
        {name: program.abstract_state[name] for name in ("params", "opt_state")},
    )
    (tmp_path / "source").mkdir()
    model_dir.save(tmp_path / "source", run.model, None, state)
    found = initial_state(program, lambda line: None)
    jax.tree.map(np.testing.assert_array_equal, {name: found[name] for name in state}, state)
    assert found["step"] == 0
    jax.tree.map(lambda leaf, wanted: leaf.sharding == wanted.sharding or pytest.fail(), found, program.abstract_state)
