"""Run that continues a published model: its model and tokenizer, and the objective of its architecture."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import assert_never

from t5x_like.config import (
    AdamWConfig,
    CausalLM,
    DataConfig,
    InitializeFrom,
    MaskedLM,
    ModelConfig,
    Objective,
    RunConfig,
    ScheduleConfig,
    SpanCorruption,
    TokenizerConfig,
    TrainingConfig,
)
from t5x_like.config.objectives import Layout
from t5x_like.data.tokenizers.published import load_published
from t5x_like.interop.huggingface.checkpoint import open_directory

_SENTINELS = 100
"""Sentinels for span corruption of a tokenizer that has none, as in T5."""
_TABLES = r"((encoder_)?token_embedder/embedding|head/(kernel|bias))"
_LENGTHS = (512, 128)


def continued_run(directory: Path) -> RunConfig:
    """Return the run that `train --from DIRECTORY` begins with; every field can be overridden.

    An encoder continues masked LM, a decoder causal LM and an encoder-decoder span corruption. A token table grows if
    the tokenizer gets tokens that it has no rows for: sentinels, mode tokens, a mask token.

    Raises:
      DataError: the directory has no model or no tokenizer that can be read.
      ConfigError: the model cannot be trained as it is described.
    """
    model = open_directory(directory).model
    objective, layout = _objective(model)
    plain = load_published(directory, 0).vocabulary
    needs_sentinels = plain.num_sentinels == 0 and (
        layout == "encoder_decoder" or (layout == "encoder" and plain.own_mask_id is None)
    )
    num_sentinels = _SENTINELS if needs_sentinels else plain.num_sentinels
    vocabulary = load_published(directory, num_sentinels).vocabulary
    rows = max(model.vocab_size, vocabulary.vocab_size)
    longest = min((s.max_positions for s in model.stacks.values() if s.positions == "learned"), default=2**30)
    inputs, targets = (min(length, longest // 2) for length in _LENGTHS)
    grown = (_TABLES,) if rows > model.vocab_size else ()
    # A decoder without a padding id attends to what follows its rows, which no scored position sees.
    pad_id = model.pad_token_id if model.pad_token_id is None else vocabulary.pad_id
    return RunConfig(
        name=directory.resolve().name,
        model=dataclasses.replace(model, vocab_size=rows, pad_token_id=pad_id),
        data=DataConfig(
            tokenizer=TokenizerConfig(kind="published", path=str(directory), num_sentinels=num_sentinels),
            layout=layout,
            mixture=(objective,),
            inputs_length=inputs,
            targets_length=0 if layout == "encoder" else targets,
        ),
        training=TrainingConfig(
            num_train_steps=1000,
            global_batch_size=16,
            optimizer=AdamWConfig(),
            schedule=ScheduleConfig(kind="cosine", learning_rate=1e-4, warmup_steps=50),
        ),
        initialize_from=InitializeFrom(directory=str(directory), resize=grown),
    )


def _objective(model: ModelConfig) -> tuple[Objective, Layout]:
    match model.architecture:
        case "encoder":
            return MaskedLM(), "encoder"
        case "decoder":
            return CausalLM(), "causal_lm"
        case "encoder_decoder":
            return SpanCorruption(name="span_corruption"), "encoder_decoder"
        case unknown:
            assert_never(unknown)
