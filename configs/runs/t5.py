"""T5 1.1 pre-training: span corruption with T5's own lengths, on any text.

`configs/runs/t5.py` is the base size: rows of 568 raw tokens become 512 inputs and 114 targets, both full, spans are
drawn from T5's exact distribution, and Adafactor uses T5's inverse square root schedule. Provide the text
(`--data.corpus.tfds c4/en` or files) and T5's vocabulary (`--data.tokenizer.path spiece.model`); without a vocabulary,
one is trained on the text. `:xxl` is the largest size, with the batch of the published checkpoints.
"""

import dataclasses

from t5x_like.config import DataConfig, RunConfig, ShardingConfig, TokenizerConfig, TrainingConfig
from t5x_like.config.mixtures import t5
from t5x_like.models import presets


def recipe() -> RunConfig:
    """Return T5 1.1 base, 2^16 steps of 128 rows: the length of the published baseline."""
    return RunConfig(
        name="t5_1_1_base",
        # T5's 32,000 pieces and 100 sentinels, and three ids for mode tokens, which this objective does not use.
        model=presets.t5_1_1("base", vocab_size=32_128),
        data=DataConfig(
            tokenizer=TokenizerConfig(vocab_size=32_000, num_sentinels=100),
            layout="encoder_decoder",
            mixture=t5(),
            inputs_length=512,
            targets_length=114,
        ),
        training=TrainingConfig(num_train_steps=2**16, global_batch_size=128),
    )


def xxl() -> RunConfig:
    """Return T5 1.1 xxl for a v5e slice of 256 chips: a million steps of 2048 rows, as for the published checkpoint."""
    run = recipe()
    return dataclasses.replace(
        run,
        name="t5_1_1_xxl",
        model=dataclasses.replace(presets.t5_1_1("xxl"), dtype="bfloat16", remat="full"),
        training=dataclasses.replace(run.training, num_train_steps=1_000_000, global_batch_size=2048),
        sharding=ShardingConfig(tensor=4, topology="v5e:16x16"),
    )
