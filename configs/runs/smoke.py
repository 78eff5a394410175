"""UL2 training in minutes on two CPU cores: a small model in four architectures on the embedded corpus.

`configs/runs/smoke.py` is the encoder-decoder; `configs/runs/smoke.py:decoder`, `:prefix_lm` and `:encoder` are a
causal decoder, a prefix-LM with the same denoisers, and a masked-LM encoder of the same size; `:electra` is the encoder
trained with replaced token detection.
"""

import dataclasses

from t5x_like.config import (
    CausalLM,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    MaskedLM,
    MuonConfig,
    RunConfig,
    ScheduleConfig,
    TokenizerConfig,
    TrainingConfig,
    ul2,
)
from t5x_like.models import presets


def recipe() -> RunConfig:
    """Return the encoder-decoder with UL2's seven denoisers."""
    return RunConfig(
        name="smoke",
        model=presets.smoke("encoder_decoder"),
        data=DataConfig(
            tokenizer=TokenizerConfig(vocab_size=4096, num_sentinels=64),
            layout="encoder_decoder",
            mixture=ul2(),
            inputs_length=128,
            targets_length=128,
        ),
        training=TrainingConfig(
            num_train_steps=1500,
            global_batch_size=8,
            optimizer=MuonConfig(),
            schedule=ScheduleConfig(kind="cosine", learning_rate=1.2e-2, warmup_steps=100, final_fraction=0.01),
        ),
        checkpoints=CheckpointConfig(save_every_steps=500),
        evaluation=EvaluationConfig(every_steps=300, num_batches=16),
    )


def prefix_lm() -> RunConfig:
    """Return the prefix-LM with the same denoisers."""
    run = recipe()
    return dataclasses.replace(
        run,
        name="smoke_prefix_lm",
        model=presets.smoke("prefix_lm"),
        data=dataclasses.replace(run.data, layout="prefix_lm"),
    )


def decoder() -> RunConfig:
    """Return the causal language model."""
    run = recipe()
    return dataclasses.replace(
        run,
        name="smoke_decoder",
        model=presets.smoke("decoder"),
        data=dataclasses.replace(run.data, layout="causal_lm", mixture=(CausalLM(),)),
    )


def encoder() -> RunConfig:
    """Return the masked language model, like BERT."""
    run = recipe()
    return dataclasses.replace(
        run,
        name="smoke_encoder",
        model=presets.smoke("encoder"),
        data=dataclasses.replace(
            run.data, layout="encoder", mixture=(MaskedLM(),), inputs_length=256, targets_length=0
        ),
    )


def electra() -> RunConfig:
    """Return ELECTRA: a masked language model as generator, and an encoder that detects its samples."""
    run = encoder()
    return dataclasses.replace(
        run,
        name="smoke_electra",
        model=presets.smoke("electra"),
        data=dataclasses.replace(run.data, mixture=(MaskedLM(replace_with_mask=1.0, replace_with_random=0.0),)),
    )
