"""A run that takes seconds, with everything that has to survive a restart: dropout, accumulation, intervals of the log
and of saving that do not coincide. `recipe.py:prefix_lm` is the same in one stack."""

import dataclasses

from t5x_like.config import (
    AdamW,
    CheckpointConfig,
    CorpusConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    MonitoringConfig,
    PrefixLM,
    RunConfig,
    Schedule,
    SpanCorruption,
    StackConfig,
    TokenizerConfig,
    TrainingConfig,
)


def recipe() -> RunConfig:
    """An encoder-decoder with one denoiser of each mode, on the texts of the current directory."""
    stack = StackConfig(
        num_layers=2,
        d_model=32,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        d_ff=64,
        positions="rope",
        dropout_rate=0.1,
    )
    return RunConfig(
        name="faults",
        model=ModelConfig(encoder=stack, decoder=stack, vocab_size=320, tie_embeddings=True, embedding_stddev=0.2),
        data=DataConfig(
            corpus=CorpusConfig(files=("texts/*.txt",), validation_fraction=0.2),
            tokenizer=TokenizerConfig(kind="bytes", num_sentinels=32),
            layout="encoder_decoder",
            mixture=(
                SpanCorruption(name="R", mean_noise_span_length=3, noise_density=0.15, mode="R"),
                PrefixLM(name="S", mode="S"),
                SpanCorruption(name="X", mean_noise_span_length=8, noise_density=0.5, mode="X"),
            ),
            inputs_length=48,
            targets_length=48,
        ),
        training=TrainingConfig(
            num_train_steps=60,
            batch_size=8,
            gradient_accumulation_steps=2,
            optimizer=AdamW(),
            schedule=Schedule(kind="cosine", learning_rate=3e-3, warmup_steps=5),
        ),
        checkpoints=CheckpointConfig(save_every_steps=8, keep_last=3),
        evaluation=EvaluationConfig(num_batches=1),
        monitoring=MonitoringConfig(log_every_steps=3, tensorboard=False, samples=1),
    )


def prefix_lm() -> RunConfig:
    """One stack with a bidirectional prefix."""
    run = recipe()
    return dataclasses.replace(
        run,
        name="faults_prefix_lm",
        model=dataclasses.replace(run.model, encoder=None),
        data=dataclasses.replace(run.data, layout="prefix_lm"),
    )
