"""T5Gemma 9B-2B: an encoder as large as Gemma 2 9B and a decoder as large as Gemma 2 2B, for a v6e slice of 256 chips.

The objective is prefix-LM at 1024/1024, with which T5Gemma was adapted; the published rows are longer. Start from
converted weights (`initialize_from`) or from random ones.
"""

import dataclasses

from t5x_like.config import (
    AdamWConfig,
    DataConfig,
    PrefixLM,
    RunConfig,
    ScheduleConfig,
    ShardingConfig,
    TokenizerConfig,
    TrainingConfig,
)
from t5x_like.models import presets


def recipe() -> RunConfig:
    """Return T5Gemma 9B-2B, 100,000 steps of 512 rows, 1M tokens."""
    return RunConfig(
        name="t5gemma_9b_2b",
        model=dataclasses.replace(presets.t5gemma("9b-2b"), remat="full"),
        data=DataConfig(
            tokenizer=TokenizerConfig(vocab_size=255_900, num_sentinels=0),
            layout="encoder_decoder",
            mixture=(PrefixLM(name="prefix_lm", min_target_fraction=0.5, max_target_fraction=0.5),),
            inputs_length=1024,
            targets_length=1024,
        ),
        training=TrainingConfig(
            num_train_steps=100_000,
            global_batch_size=512,
            optimizer=AdamWConfig(),
            schedule=ScheduleConfig(kind="cosine", learning_rate=1e-4, warmup_steps=2000, final_fraction=0.1),
        ),
        sharding=ShardingConfig(topology="v6e:16x16"),
    )
