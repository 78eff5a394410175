"""Run configurations of models with a task head."""

from __future__ import annotations

import dataclasses

from helpers.model_examples import model

from t5x_like.config import (
    CorpusConfig,
    DataConfig,
    LabeledExamples,
    RunConfig,
    TaskHeadConfig,
    TokenizerConfig,
)
from t5x_like.config.training import TrainingConfig

LABELS = ("red", "green", "blue")


def with_head(kind, architecture="encoder", **changes):
    labels = LABELS if "classification" in kind else ()
    config = model(architecture, "rope", stack_changes={"num_layers": 1})
    return dataclasses.replace(config, task_head=TaskHeadConfig(kind=kind, labels=labels, **changes))


def labeled_run() -> RunConfig:
    corpus = CorpusConfig(
        files=("texts.jsonl",), inputs_field="text", text_field="label", target_kind="label", labels=LABELS
    )
    return RunConfig(
        name="labelled",
        model=dataclasses.replace(with_head("classification"), vocab_size=300),
        data=DataConfig(
            corpus=corpus,
            tokenizer=TokenizerConfig(kind="bytes", num_sentinels=4),
            layout="encoder",
            mixture=(LabeledExamples(kind="classification"),),
            inputs_length=32,
            targets_length=0,
        ),
        training=TrainingConfig(num_train_steps=10, global_batch_size=8),
    )
