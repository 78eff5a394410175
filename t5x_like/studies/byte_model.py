"""Model of bytes that the shipped studies of text train: rows of a single stack execute the same FLOPs in every layout.

With bytes the head is a small part of them. A vocabulary of pieces would make a study at equal FLOPs one of heads.
"""

from __future__ import annotations

import dataclasses

from t5x_like.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    MonitoringConfig,
    MuonConfig,
    Objective,
    PrefixLM,
    RunConfig,
    ScheduleConfig,
    StackConfig,
    TokenizerConfig,
    TrainingConfig,
)
from t5x_like.config.layouts import Layout, architecture_of
from t5x_like.studies.study import Tier

CONTINUATION = (128, 128)
"""Given and scored bytes."""
ROW = 260
"""Positions of a row: the continuation with mode token and EOS, and a little more."""
HALF_GIVEN = PrefixLM(name="prefix", min_target_fraction=0.5, max_target_fraction=0.5)
"""Prefix LM whose windows fill the rows of both stacks: no arm has positions that others do not use."""


def byte_run(tier: Tier, layout: Layout, mixture: tuple[Objective, ...]) -> RunConfig:
    """Return a run of 0.9M parameters for two cores, or of 25M for an accelerator.

    An encoder-decoder has two of the stacks.
    """
    width, layers, batch = (128, 4, 8) if tier == "cpu" else (512, 8, 128)
    stack = StackConfig(
        num_layers=layers,
        d_model=width,
        num_heads=4,
        num_kv_heads=4,
        head_dim=width // 4,
        d_ff=3 * width,
        mlp_gated=True,
        positions="rope",
    )
    return RunConfig(
        name="byte_model",
        model=byte_model(stack, layout),
        data=DataConfig(
            tokenizer=TokenizerConfig(kind="bytes", num_sentinels=96),
            layout=layout,
            mixture=mixture,
            inputs_length=ROW if layout == "encoder" else ROW // 2,
            targets_length=0 if layout == "encoder" else ROW // 2,
        ),
        training=TrainingConfig(
            num_train_steps=1,
            global_batch_size=batch,
            optimizer=MuonConfig(),
            schedule=ScheduleConfig(kind="cosine", learning_rate=0.012, warmup_steps=50, final_fraction=0.1),
        ),
        checkpoints=CheckpointConfig(save_every_steps=200),
        evaluation=EvaluationConfig(every_steps=100, num_batches=4, continuation=CONTINUATION),
        monitoring=MonitoringConfig(writers=(), num_decoded_samples=0),
    )


def byte_model(stack: StackConfig, layout: Layout) -> ModelConfig:
    """Return the model that reads a layout, all of whose stacks are the same."""
    architecture = architecture_of(layout)
    return ModelConfig(
        encoder=None if architecture == "decoder" else stack,
        decoder=None if architecture == "encoder" else stack,
        vocab_size=384,
    )


def with_merged_attention(model: ModelConfig) -> ModelConfig:
    """Return an encoder-decoder whose cross-attention shares the projections and the softmax of self-attention."""
    assert model.decoder is not None
    return dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, cross_attention="merged"))


def with_half_of_the_layers(model: ModelConfig) -> ModelConfig:
    """Return the model with half of the layers in each of its stacks."""
    halves = {
        name: dataclasses.replace(stack, num_layers=stack.num_layers // 2) for name, stack in model.stacks.items()
    }
    return dataclasses.replace(model, encoder=halves.get("encoder"), decoder=halves.get("decoder"))
