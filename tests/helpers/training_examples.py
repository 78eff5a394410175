"""A model small enough that its gradient is known: a table of logits by input token."""

from __future__ import annotations

from typing import Any

import numpy as np

from t5x_like.config import (
    AdamWConfig,
    CausalLM,
    DataConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    StackConfig,
    TrainingConfig,
)

VOCABULARY, ROWS, LENGTH = 7, 8, 5


def run_with(dropout_rate: float = 0.0, **training: Any) -> RunConfig:
    stack = StackConfig(
        num_layers=1, d_model=8, num_heads=1, num_kv_heads=1, head_dim=8, d_ff=8, dropout_rate=dropout_rate
    )
    options = {"max_gradient_norm": None, "z_loss": 0.0, "optimizer": AdamWConfig(weight_decay=0.0)} | training
    return RunConfig(
        name="t",
        model=ModelConfig(encoder=None, decoder=stack, vocab_size=VOCABULARY),
        data=DataConfig(
            layout="causal_lm",
            mixture=(CausalLM(name="even"), CausalLM(name="odd")),
            inputs_length=0,
            targets_length=LENGTH,
        ),
        training=TrainingConfig(
            num_train_steps=10,
            global_batch_size=ROWS,
            schedule=ScheduleConfig(kind="constant", learning_rate=0.5, warmup_steps=0),
            **options,
        ),
    )


def batch_of(seed: int = 0, rows: int = ROWS) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCABULARY, (rows, LENGTH + 1)).astype(np.int32)
    weights = (np.arange(LENGTH) < rng.integers(0, LENGTH + 1, (rows, 1))).astype(np.int32)
    return {
        "main": {
            "decoder_input_tokens": tokens[:, :-1],
            "decoder_target_tokens": tokens[:, 1:],
            "decoder_loss_weights": weights,
            "denoiser_ids": np.arange(rows, dtype=np.int32) % 2,
        }
    }
