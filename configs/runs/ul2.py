"""UL2's seven denoisers at full length, with well filled rows.

`configs/runs/ul2.py` is an encoder-decoder at 512/512. The denoisers with short targets have their own sub-batches,
512/128 and 512/176 token positions, and two windows of S share a row, so that 98 % of all positions are not padding;
plain rows of 512/512 are 73 to 83 % full. `:prefix_lm` is the same mixture in single rows of 1024, `:ul2_20b` the
published size.
"""

import dataclasses

from t5x_like.config import DataConfig, RunConfig, ShardingConfig, TokenizerConfig, TrainingConfig, ul2
from t5x_like.models import presets


def recipe() -> RunConfig:
    """Return T5 1.1 base with UL2's mixture: batches of 112 rows, 48 of them with short targets."""
    return RunConfig(
        name="ul2_base",
        # 32,000 pieces, a sentinel for each of the up to 128 spans of X, and the three mode tokens.
        model=presets.t5_1_1("base", vocab_size=32_256),
        data=DataConfig(
            tokenizer=TokenizerConfig(vocab_size=32_000, num_sentinels=128),
            layout="encoder_decoder",
            mixture=ul2(complementary_pairs=True),
            inputs_length=512,
            targets_length=512,
            targets_length_buckets=(176, 128),
        ),
        training=TrainingConfig(num_train_steps=100_000, global_batch_size=112),
    )


def prefix_lm() -> RunConfig:
    """Return a prefix-LM with 1B parameters; rows of a single sequence are full without sub-batches."""
    run = recipe()
    return dataclasses.replace(
        run,
        name="ul2_prefix_lm_1b",
        model=presets.decoder_1b(),
        data=dataclasses.replace(run.data, layout="prefix_lm", mixture=ul2(), targets_length_buckets=()),
    )


def ul2_20b() -> RunConfig:
    """Return UL2 20B for a v5p slice of 64 chips: steps of 0.7M tokens, close to the paper's 1024 rows."""
    run = recipe()
    model = dataclasses.replace(presets.ul2_20b(), vocab_size=32_256, dtype="bfloat16", remat="full")
    return dataclasses.replace(
        run,
        name="ul2_20b",
        model=model,
        training=dataclasses.replace(run.training, num_train_steps=1_000_000, global_batch_size=896),
        sharding=ShardingConfig(topology="v5p:4x4x4"),
    )
