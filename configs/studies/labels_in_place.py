"""A label for each word that one word anywhere in the text decides: what a causal mask cannot know, exactly."""

import dataclasses
import json
import math
import random
from pathlib import Path

from t5x_like.config import (
    AdamWConfig,
    CheckpointConfig,
    CorpusConfig,
    DataConfig,
    EvaluationConfig,
    LabeledExamples,
    ModelConfig,
    MonitoringConfig,
    RunConfig,
    ScheduleConfig,
    StackConfig,
    TaskHeadConfig,
    TokenizerConfig,
    TrainingConfig,
)
from t5x_like.config.layouts import Layout
from t5x_like.studies.study import Arm, Budget, Prediction, Study, Tier
from t5x_like.utils.atomic_write import write_atomically

WORDS = 12
CEILING = (3 * WORDS + 1) / (4 * WORDS)
"""Accuracy of a model that knows the label from the cue on and guesses it before: the mean of (1 + i / n) / 2."""
LOSS = (WORDS - 1) / (2 * WORDS) * math.log(2)
LAYOUTS: tuple[Layout, ...] = ("causal_lm", "prefix_lm", "encoder")
LENGTH = 2 * WORDS
"""Positions of a text of words of one byte: the words, the spaces between them, and EOS."""


def study(tier: Tier, folder: Path) -> Study:
    """Return the study: three masks on one task."""
    base = _run(folder, tier)
    causal, prefix, encoder = (_in_layout(base, layout) for layout in LAYOUTS)
    theory = "calculation: words before the cue are a guess, the others are certain"
    return Study(
        question="What can a model not know if it reads a text from left to right only?",
        description=f"Each text has {WORDS} words. One of them, at a uniform place, is the cue L or R, and every "
        "word is labelled with the cue. The held-out texts are balanced: each place, and each text with both cues.",
        arms=(Arm("causal", causal), Arm("prefix", prefix), Arm("encoder", encoder)),
        seeds=(0, 1, 2),
        # Each arm reads the same texts; rows of decoders have one position more, for their start token.
        budget=Budget("steps", 400 if tier == "cpu" else 4000),
        measure="accuracy/labels",
        also=("loss/labels",),
        predictions=(
            Prediction(
                f"a causal mask reaches {CEILING:.4f}", theory, "causal", low=CEILING - 0.04, high=CEILING + 0.04
            ),
            Prediction("a bidirectional prefix reaches 1", theory, "prefix", low=0.99, high=1.0),
            Prediction("an encoder reaches 1", theory, "encoder", low=0.99, high=1.0),
            Prediction(
                f"the causal mask loses {1 - CEILING:.4f}", theory, "causal", "encoder", CEILING - 1.04, CEILING - 0.96
            ),
            Prediction(
                f"the loss of the causal mask is {LOSS:.4f} nats",
                theory,
                "causal",
                low=LOSS - 0.02,
                high=LOSS + 0.05,
                score="loss/labels",
            ),
        ),
        cannot_show=(
            "How much the words before a cue matter in text: here they are the whole task.",
            "Whether a larger causal decoder does better. It cannot: the ceiling does not depend on the model.",
            "Other differences of the architectures: the arms have the same layers.",
        ),
        write_files=_write,
    )


def _run(folder: Path, tier: Tier) -> RunConfig:
    width = 64 if tier == "cpu" else 256
    stack = StackConfig(
        num_layers=2, d_model=width, num_heads=4, num_kv_heads=4, head_dim=width // 4, d_ff=2 * width, positions="rope"
    )
    return RunConfig(
        name="labels",
        model=ModelConfig(
            encoder=stack,
            decoder=None,
            vocab_size=288,
            task_head=TaskHeadConfig(kind="token_classification", labels=("L", "R")),
        ),
        data=DataConfig(
            corpus=CorpusConfig(
                files=(str(folder / "train.jsonl"),),
                validation_files=(str(folder / "validation.jsonl"),),
                inputs_field="text",
                text_field="labels",
                target_kind="token_labels",
                labels=("L", "R"),
            ),
            tokenizer=TokenizerConfig(kind="bytes", num_sentinels=0),
            layout="encoder",
            mixture=(LabeledExamples(kind="token_classification", name="labels"),),
            inputs_length=LENGTH,
            targets_length=0,
            store_dir=str(folder / "stores"),
        ),
        training=TrainingConfig(
            num_train_steps=400,
            global_batch_size=64,
            optimizer=AdamWConfig(weight_decay=0.0),
            schedule=ScheduleConfig(kind="cosine", learning_rate=3e-3, warmup_steps=40, final_fraction=0.1),
        ),
        checkpoints=CheckpointConfig(save_every_steps=200),
        evaluation=EvaluationConfig(every_steps=50, num_batches=15),
        monitoring=MonitoringConfig(writers=(), num_decoded_samples=0),
    )


def _in_layout(run: RunConfig, layout: Layout) -> RunConfig:
    if layout == "encoder":
        return run
    model = dataclasses.replace(run.model, encoder=None, decoder=run.model.encoder)
    # The start token of a decoder takes a position: without one more, the last word would be cut.
    data = dataclasses.replace(run.data, layout=layout, inputs_length=LENGTH + 1)
    return dataclasses.replace(run, model=model, data=data)


def _write(folder: Path) -> None:
    """Write the texts: random ones to train on, and held out each place of the cue 40 times, with both cues."""
    rng = random.Random(0)
    held_out = [words for place in range(WORDS) for _ in range(40) for words in _both_cues(rng, place)]
    seen = {tuple(words) for words in held_out}
    train = [
        words for _ in range(10_000) for words in _both_cues(rng, rng.randrange(WORDS)) if tuple(words) not in seen
    ]
    for name, texts in (("train", train), ("validation", held_out)):
        path = folder / f"{name}.jsonl"
        if not path.exists():
            write_atomically(path, "".join(_line(words) for words in texts))


def _both_cues(rng: random.Random, place: int) -> list[list[str]]:
    words = [rng.choice("abcdefghij") for _ in range(WORDS)]
    return [[*words[:place], cue, *words[place + 1 :]] for cue in "LR"]


def _line(words: list[str]) -> str:
    cue = next(word for word in words if word in "LR")
    return json.dumps({"text": " ".join(words), "labels": " ".join(cue for _ in words)}) + "\n"
