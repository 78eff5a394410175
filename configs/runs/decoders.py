"""Causal decoders in the shapes of published models, each for the machine that it names.

`configs/runs/decoders.py` has 1B parameters, `:llama_8b` the shape of Llama 3.1 8B on two slices, `:mixtral_8x7b` a
mixture of experts. Rows are 4096 tokens. Bring the text (`--data.corpus.files`) and a vocabulary, or let `prepare`
train one on the text.
"""

import dataclasses

from t5x_like.config import (
    AdamW,
    CausalLM,
    DataConfig,
    Experts,
    PartitioningConfig,
    RunConfig,
    Schedule,
    TokenizerConfig,
    TrainingConfig,
)
from t5x_like.models import presets


def recipe() -> RunConfig:
    """1B parameters for a v5e of 256 chips: 100,000 steps of 1M tokens."""
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
            batch_size=256,
            optimizer=AdamW(),
            schedule=Schedule(kind="cosine", learning_rate=3e-4, warmup_steps=2000, final_fraction=0.1),
        ),
        partitioning=PartitioningConfig(topology="v5e:16x16"),
    )


def llama_8b() -> RunConfig:
    """8B parameters for two slices of v6e-256, each of which has a copy of the model: steps of 2M tokens."""
    run = recipe()
    return dataclasses.replace(
        run,
        name="llama_8b",
        model=dataclasses.replace(presets.llama_3("8b"), remat="full"),
        training=dataclasses.replace(run.training, num_train_steps=500_000, batch_size=512),
        partitioning=PartitioningConfig(topology="2 x v6e:16x16"),
    )


def mixtral_8x7b() -> RunConfig:
    """47B parameters in 8 experts for a v5p of 64 chips; an expert has room for 1.25 times its even share of tokens."""
    run = recipe()
    model = presets.mixtral_8x7b()
    assert model.decoder is not None
    decoder = dataclasses.replace(model.decoder, experts=Experts(num_experts=8, capacity_factor=1.25))
    return dataclasses.replace(
        run,
        name="mixtral_8x7b",
        model=dataclasses.replace(model, decoder=decoder, remat="full"),
        data=dataclasses.replace(run.data, tokenizer=TokenizerConfig(vocab_size=31_900, num_sentinels=0)),
        training=dataclasses.replace(run.training, num_train_steps=500_000, batch_size=256),
        partitioning=PartitioningConfig(expert=8, topology="v5p:4x4x4"),
    )
