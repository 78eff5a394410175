"""Untrained run with everything that `generate` reads: its completions are noise, and reproducible."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import jax
import numpy as np

from t5x_like import run_directory
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config import (
    CheckpointConfig,
    CorpusConfig,
    DataConfig,
    ModelConfig,
    PrefixLM,
    RunConfig,
    SpanCorruption,
    StackConfig,
    TokenizerConfig,
    TrainingConfig,
)
from t5x_like.data.store.prepare import open_stores, prepare
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.program import build_program


def make_run(directory: Path) -> Path:
    """Write a run with checkpoints of steps 3 and 5, and return its directory."""
    (directory / "texts").mkdir(parents=True)
    rng = random.Random(0)
    for number in range(8):
        (directory / "texts" / f"{number}.txt").write_text("".join(rng.choices("abcdefgh ", k=400)))
    stack = StackConfig(num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=32, positions="rope")
    run = RunConfig(
        name="prompted",
        model=ModelConfig(encoder=stack, decoder=stack, vocab_size=288),
        data=DataConfig(
            corpus=CorpusConfig(files=(str(directory / "texts" / "*.txt"),), validation_fraction=0.2),
            tokenizer=TokenizerConfig(kind="bytes", num_sentinels=16),
            layout="encoder_decoder",
            mixture=(SpanCorruption(name="R", mode="R"), PrefixLM(name="S", mode="S")),
            inputs_length=24,
            targets_length=24,
            store_dir=str(directory / "stores"),
        ),
        training=TrainingConfig(num_train_steps=5, global_batch_size=4),
    )
    prepare(run.data, report=lambda line: None)
    run_dir = directory / "run"
    run_dir.mkdir()
    run_directory.claim_config(run_directory.RunRecord(run_dir), run)
    program = build_program(run, jax.devices()[:1])
    state = program.init()
    draw = np.random.default_rng(0)
    state["params"] = jax.tree.map(
        lambda leaf: leaf + draw.normal(0, 0.3, leaf.shape).astype(leaf.dtype), state["params"]
    )
    fingerprint = TrainingStream(open_stores(run.data), run.data, run.training.global_batch_size).fingerprint
    manager = CheckpointManager(
        run_dir / run_directory.CHECKPOINTS, dataclasses.replace(CheckpointConfig(), max_to_keep=9)
    )
    for step in (3, 5):
        manager.save(step, program.checkpointable_state(state), {"data": {"fingerprint": fingerprint}})
    manager.close()
    return run_dir
