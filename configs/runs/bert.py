"""BERT-large pre-training without sentence pairs: masked tokens in rows of 512, for a v5e slice of 256 chips.

Batches are large (RoBERTa's 8192 rows), so that 256 chips are used well. Provide the text and BERT's vocabulary, or let
`prepare` train a vocabulary.
"""

import dataclasses

from t5x_like.config import (
    AdamWConfig,
    DataConfig,
    MaskedLM,
    RunConfig,
    ScheduleConfig,
    ShardingConfig,
    TokenizerConfig,
    TrainingConfig,
)
from t5x_like.models import presets


def recipe() -> RunConfig:
    """Return BERT-large, 500,000 steps of 8192 rows."""
    return RunConfig(
        name="bert_large",
        model=dataclasses.replace(presets.bert("large"), dtype="bfloat16", remat="full"),
        data=DataConfig(
            tokenizer=TokenizerConfig(vocab_size=30_400, num_sentinels=1),
            layout="encoder",
            mixture=(MaskedLM(),),
            inputs_length=512,
            targets_length=0,
        ),
        training=TrainingConfig(
            num_train_steps=500_000,
            global_batch_size=8192,
            optimizer=AdamWConfig(b2=0.98, eps=1e-6, weight_decay=0.01),
            schedule=ScheduleConfig(kind="cosine", learning_rate=4e-4, warmup_steps=30_000),
        ),
        sharding=ShardingConfig(topology="v5e:16x16"),
    )
