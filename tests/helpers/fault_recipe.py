"""Recipe of a run of seconds with all state that must survive a restart: dropout, gradient accumulation, and different
intervals of logging and saving. `fault_recipe.py:prefix_lm` is the same run as a prefix LM."""

import dataclasses

from t5x_like.config import (
    AdamWConfig,
    CheckpointConfig,
    CorpusConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    MonitoringConfig,
    PrefixLM,
    RunConfig,
    ScheduleConfig,
    SpanCorruption,
    StackConfig,
    TokenizerConfig,
    TrainingConfig,
)


def recipe() -> RunConfig:
    """Return an encoder-decoder with one denoiser of each mode, on the texts of the current directory."""
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
            global_batch_size=8,
            gradient_accumulation_steps=2,
            ema_decay=0.9,
            optimizer=AdamWConfig(),
            schedule=ScheduleConfig(kind="cosine", learning_rate=3e-3, warmup_steps=5),
        ),
        checkpoints=CheckpointConfig(save_every_steps=8, max_to_keep=3),
        evaluation=EvaluationConfig(num_batches=1),
        monitoring=MonitoringConfig(log_every_steps=3, writers=(), record_rows=True, num_decoded_samples=1),
    )


def prefix_lm() -> RunConfig:
    """Return the recipe with a prefix LM in place of the encoder-decoder."""
    run = recipe()
    return dataclasses.replace(
        run,
        name="faults_prefix_lm",
        model=dataclasses.replace(run.model, encoder=None),
        data=dataclasses.replace(run.data, layout="prefix_lm"),
    )


def broken_writer() -> RunConfig:
    """Return the recipe with a metric writer whose service is out of order."""
    run = recipe()
    monitoring = dataclasses.replace(run.monitoring, writers=("broken",))
    return dataclasses.replace(run, plugins=("broken_writer.py",), monitoring=monitoring)


def faulty() -> RunConfig:
    """Return the recipe with the faults of `fault_plugin`."""
    run = recipe()
    monitoring = dataclasses.replace(run.monitoring, callbacks=("faults",))
    return dataclasses.replace(run, plugins=("fault_plugin.py",), monitoring=monitoring)
