"""Causal decoders with the shapes of published models, each with its topology.

`configs/runs/decoders.py` has 1B parameters, `:llama_8b` the shape of Llama 3.1 8B on two slices, `:mixtral_8x7b` a
mixture of experts. Rows have 4096 tokens. Provide the text (`--data.corpus.files`) and a vocabulary, or let
`prepare` train one on the text.
"""

import dataclasses

from t5x_like.config import (
    AdamWConfig,
    CausalLM,
    DataConfig,
    RunConfig,
    ScheduleConfig,
    ShardingConfig,
    TokenizerConfig,
    TrainingConfig,
)
from t5x_like.models import presets


def recipe() -> RunConfig:
    """Return a decoder with 1B parameters for a v5e slice of 256 chips: 100,000 steps of 1M tokens."""
    return RunConfig(
        name="decoder_1b",
        model=dataclasses.replace(presets.decoder_1b(), remat="full"),
        data=DataConfig(
            tokenizer=TokenizerConfig(vocab_size=128_000, num_sentinels=0),
            layout="causal_lm",
            mixture=(CausalLM(),),
            inputs_length=0,
            targets_length=4096,
        ),
        training=TrainingConfig(
            num_train_steps=100_000,
            global_batch_size=256,
            optimizer=AdamWConfig(),
            schedule=ScheduleConfig(kind="cosine", learning_rate=3e-4, warmup_steps=2000, final_fraction=0.1),
        ),
        sharding=ShardingConfig(topology="v5e:16x16"),
    )


def llama_8b() -> RunConfig:
    """Return a decoder with 8B parameters for two slices of v6e-256, one copy of the model each: 2M tokens per step."""
    run = recipe()
    return dataclasses.replace(
        run,
        name="llama_8b",
        model=dataclasses.replace(presets.llama_3("8b"), remat="full"),
        training=dataclasses.replace(run.training, num_train_steps=500_000, global_batch_size=512),
        sharding=ShardingConfig(topology="2 x v6e:16x16"),
    )


def mixtral_8x7b() -> RunConfig:
    """Return a mixture of 8 experts with 47B parameters for a v5p slice of 64 chips."""
    run = recipe()
    return dataclasses.replace(
        run,
        name="mixtral_8x7b",
        model=dataclasses.replace(presets.mixtral_8x7b(), remat="full"),
        data=dataclasses.replace(run.data, tokenizer=TokenizerConfig(vocab_size=31_900, num_sentinels=0)),
        training=dataclasses.replace(run.training, num_train_steps=500_000, global_batch_size=256),
        sharding=ShardingConfig(expert=8, topology="v5p:4x4x4"),
    )
