"""Run configurations small enough to train within a test."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t5x_like.config import (
    AdamWConfig,
    CorpusConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    MonitoringConfig,
    Objective,
    RunConfig,
    ScheduleConfig,
    StackConfig,
    TokenizerConfig,
    TrainingConfig,
)
from t5x_like.config.objectives import Layout

STACK = StackConfig(num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=64, positions="rope")
EMBEDDED_CORPUS = CorpusConfig(packages=False, max_documents=40, validation_fraction=0.1)


def small_run(
    directory: Path,
    layout: Layout,
    mixture: Sequence[Objective],
    *,
    corpus: CorpusConfig = EMBEDDED_CORPUS,
    lengths: tuple[int, int] = (32, 32),
    num_sentinels: int = 16,
    stack: Mapping[str, Any] = {},
    model: Mapping[str, Any] = {},
    data: Mapping[str, Any] = {},
    training: Mapping[str, Any] = {},
    **sections: Any,
) -> RunConfig:
    """Return a run of one or two small stacks over a byte vocabulary, with its stores in `directory`/stores.

    Args:
      directory: Where the token stores are.
      layout, mixture: Of the training rows.
      corpus: The text; by default a part of the embedded corpus.
      lengths: Inputs and targets.
      num_sentinels: Of the byte vocabulary. The model's vocabulary is the next multiple of 32.
      stack, model, data, training: Fields that differ from the defaults, which are AdamW without weight decay at a
        constant learning rate of 0.01, 8 rows per step.
      sections: Whole sections of the run (`checkpoints`, `evaluation`, ...) and its name.
    """
    layers = dataclasses.replace(STACK, **stack)
    fields = {
        "encoder": layers if layout in ("encoder_decoder", "encoder") else None,
        "decoder": None if layout == "encoder" else layers,
        "vocab_size": -(-(263 + num_sentinels) // 32) * 32,
    }
    defaults: dict[str, Any] = {
        "name": "small",
        "evaluation": EvaluationConfig(num_batches=1),
        "monitoring": MonitoringConfig(writers=(), num_decoded_samples=0),
    }
    steps = {
        "num_train_steps": 4,
        "global_batch_size": 8,
        "optimizer": AdamWConfig(weight_decay=0.0),
        "schedule": ScheduleConfig(kind="constant", learning_rate=1e-2, warmup_steps=0),
    }
    rows = {
        "corpus": corpus,
        "tokenizer": TokenizerConfig(kind="bytes", num_sentinels=num_sentinels),
        "inputs_length": lengths[0],
        "targets_length": lengths[1],
        "store_dir": str(directory / "stores"),
    }
    return RunConfig(
        model=ModelConfig(**(fields | dict(model))),
        data=DataConfig(layout=layout, mixture=tuple(mixture), **(rows | dict(data))),
        training=TrainingConfig(**(steps | dict(training))),
        **(defaults | sections),
    )
