"""One small run of each architecture, with the same corpus and tokenizer: `multiprocess_recipe.py:decoder`."""

import dataclasses

from t5x_like.config import (
    AdamWConfig,
    CausalLM,
    CheckpointConfig,
    CorpusConfig,
    DataConfig,
    EvaluationConfig,
    MaskedLM,
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

STACK = StackConfig(
    num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=32, positions="rope", dropout_rate=0.1
)
DATA = DataConfig(
    corpus=CorpusConfig(files=("texts/*.txt",), validation_fraction=0.2),
    tokenizer=TokenizerConfig(kind="bytes", num_sentinels=32),
    layout="encoder_decoder",
    mixture=(
        SpanCorruption(name="R", mean_noise_span_length=3, noise_density=0.15, mode="R"),
        PrefixLM(name="S", mode="S"),
    ),
    inputs_length=32,
    targets_length=32,
)


def encoder_decoder() -> RunConfig:
    """Return the recipe that the others change in model and layout."""
    return RunConfig(
        name="processes",
        model=ModelConfig(encoder=STACK, decoder=STACK, vocab_size=320, tie_embeddings=True, embedding_stddev=0.2),
        data=DATA,
        training=TrainingConfig(
            num_train_steps=24,
            global_batch_size=8,
            optimizer=AdamWConfig(),
            schedule=ScheduleConfig(kind="constant", learning_rate=3e-3, warmup_steps=2),
        ),
        checkpoints=CheckpointConfig(save_every_steps=4, max_to_keep=10),
        evaluation=EvaluationConfig(num_batches=1),
        monitoring=MonitoringConfig(
            log_every_steps=1, writers=(), record_rows=True, determinism_check_every=10, num_decoded_samples=0
        ),
    )


def faulty() -> RunConfig:
    """Return the recipe with the faults of `fault_plugin`."""
    run = encoder_decoder()
    monitoring = dataclasses.replace(run.monitoring, callbacks=("faults",))
    return dataclasses.replace(run, plugins=("fault_plugin.py",), monitoring=monitoring)


def prefix_lm() -> RunConfig:
    run = encoder_decoder()
    model = dataclasses.replace(run.model, encoder=None)
    return dataclasses.replace(run, model=model, data=dataclasses.replace(DATA, layout="prefix_lm"))


def decoder() -> RunConfig:
    run = prefix_lm()
    data = dataclasses.replace(DATA, layout="causal_lm", mixture=(CausalLM(name="causal"),))
    return dataclasses.replace(run, data=data)


def encoder() -> RunConfig:
    run = encoder_decoder()
    model = dataclasses.replace(run.model, decoder=None)
    data = dataclasses.replace(DATA, layout="encoder", mixture=(MaskedLM(name="masked"),), targets_length=0)
    return dataclasses.replace(run, model=model, data=data)


def broken_writer() -> RunConfig:
    """Return the recipe of a decoder with a metric writer whose service is out of order."""
    run = decoder()
    monitoring = dataclasses.replace(run.monitoring, writers=("broken",))
    return dataclasses.replace(run, plugins=("broken_writer.py",), monitoring=monitoring)
