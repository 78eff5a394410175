"""One small run of each architecture, with the same corpus and tokenizer: `recipe.py:decoder`."""

import dataclasses

from t5x_like.config import (
    AdamW,
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
    Schedule,
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
    """The others are this one with another model and layout."""
    return RunConfig(
        name="processes",
        model=ModelConfig(encoder=STACK, decoder=STACK, vocab_size=320, tie_embeddings=True, embedding_stddev=0.2),
        data=DATA,
        training=TrainingConfig(
            num_train_steps=24,
            batch_size=8,
            optimizer=AdamW(),
            schedule=Schedule(kind="constant", learning_rate=3e-3, warmup_steps=2),
        ),
        checkpoints=CheckpointConfig(save_every_steps=4, keep_last=10),
        evaluation=EvaluationConfig(num_batches=1),
        monitoring=MonitoringConfig(log_every_steps=1, tensorboard=False, samples=0),
    )


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
