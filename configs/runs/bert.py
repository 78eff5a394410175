"""BERT-large as it was pre-trained, but for the sentence pairs: masked tokens in rows of 512, for a v5e of 256 chips.

Batches are large (RoBERTa's 8192 rows), so that 256 chips have work. Bring the text and BERT's vocabulary, or let
`prepare` train one.
"""

import dataclasses

from t5x_like.config import (
    AdamW,
    DataConfig,
    MaskedLM,
    PartitioningConfig,
    RunConfig,
    Schedule,
    TokenizerConfig,
    TrainingConfig,
)
from t5x_like.models import presets


def recipe() -> RunConfig:
    """BERT-large, 500,000 steps of 8192 rows."""
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
            batch_size=8192,
            optimizer=AdamW(b2=0.98, eps=1e-6, weight_decay=0.01),
            schedule=Schedule(kind="cosine", learning_rate=4e-4, warmup_steps=30_000),
        ),
        partitioning=PartitioningConfig(topology="v5e:16x16"),
    )
