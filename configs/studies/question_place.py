"""A question before or after the text that answers it: what does it cost to read without knowing the question?"""

import json
import random
from pathlib import Path

from t5x_like.config import (
    CheckpointConfig,
    CorpusConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    MonitoringConfig,
    MuonConfig,
    RunConfig,
    ScheduleConfig,
    StackConfig,
    Supervised,
    TokenizerConfig,
    TrainingConfig,
)
from t5x_like.config.layouts import Layout
from t5x_like.studies.study import Arm, Budget, Prediction, StepsTo, Study, Tier
from t5x_like.utils.atomic_write import write_atomically

PAIRS = 2
LETTERS, DIGITS = "abcdef", "0123456789"
ORDERS = {
    "kvq": "{pairs}{question}",
    "vkq": "{swapped}{question}",
    "qkv": "{question}{pairs}",
    "qvk": "{question}{swapped}",
}
"""Texts by name: k is the letter of a pair, v its digit, and q the question."""
LAYOUTS: dict[str, Layout] = {"causal": "causal_lm", "prefix": "prefix_lm", "encdec": "encoder_decoder"}
SOLVED = 0.975
"""Token accuracy at which 95 % of the digits are right: half of the scored tokens are the EOS after the digit, which
is always the same."""
PLACE = 1.5
"""Ratio of steps from which on the place of the question matters."""


def study(tier: Tier, folder: Path) -> Study:
    """Return the study: four orders of the same texts under three masks."""
    arms = tuple(
        Arm(f"{mask}-{order}", _run(tier, folder, layout, order))
        for mask, layout in LAYOUTS.items()
        for order in ORDERS
    )
    pilot = "a pilot with one seed"
    return Study(
        question="What does it cost to read a text without knowing the question?",
        description=f"Each text has {PAIRS} pairs of a letter and a digit, and a question for the digit of one letter. "
        "The question is the first or the last part (q), and the letter is before or after its digit (kv, vk). A "
        "causal mask, a bidirectional prefix and an encoder-decoder read the four orders. All of them can answer all "
        "questions; the study measures how fast they learn it.",
        arms=arms,
        seeds=(0, 1, 2),
        budget=Budget("executed_flops", 1.5e12 if tier == "cpu" else 2e14),
        measure="accuracy/retrieval",
        also=("loss/retrieval",),
        steps_to=(StepsTo("steps_to_95_percent", "accuracy/retrieval", SOLVED),),
        predictions=(
            *(
                Prediction(
                    f"a causal mask learns at least {PLACE} times later if the question is last ({pairs})",
                    pilot,
                    f"causal-{pairs}q",
                    f"causal-q{pairs}",
                    low=PLACE,
                    score="steps_to_95_percent",
                    is_ratio=True,
                )
                for pairs in ("kv", "vk")
            ),
            *(
                Prediction(
                    f"{reader} learns less than {PLACE} times later if the question is last",
                    "the text is read with the question in view",
                    f"{mask}-kvq",
                    f"{mask}-qkv",
                    low=1 / PLACE,
                    high=PLACE,
                    score="steps_to_95_percent",
                    is_ratio=True,
                )
                for mask, reader in (("prefix", "a bidirectional prefix"), ("encdec", "an encoder-decoder"))
            ),
            Prediction(
                "the order within the pairs does not matter to a causal mask",
                pilot,
                "causal-vkq",
                "causal-kvq",
                -0.05,
                0.05,
            ),
            Prediction("a causal mask that knows the question solves the task", pilot, "causal-qkv", low=0.99),
        ),
        cannot_show=(
            "What a causal mask that reads the question last cannot learn: every arm can be trained until it answers.",
            "Texts of more than two facts, where the states of a text have to hold more: with four pairs, 26 letters "
            "and AdamW only the causal arms with the question first had begun to learn after 2,042 steps (one seed).",
            "Whether a question matters to real text, most of which answers none.",
        ),
        write_files=_write,
    )


def _run(tier: Tier, folder: Path, layout: Layout, order: str) -> RunConfig:
    width = 64 if tier == "cpu" else 256
    stack = StackConfig(
        num_layers=3, d_model=width, num_heads=4, num_kv_heads=4, head_dim=width // 4, d_ff=2 * width, positions="rope"
    )
    return RunConfig(
        name="question_place",
        model=ModelConfig(
            encoder=stack if layout == "encoder_decoder" else None,
            decoder=stack,
            vocab_size=288,
            tie_embeddings=True,
            embedding_stddev=width**-0.5,
        ),
        data=DataConfig(
            corpus=CorpusConfig(
                files=(str(folder / f"{order}.train.jsonl"),),
                validation_files=(str(folder / f"{order}.validation.jsonl"),),
                inputs_field="text",
                text_field="answer",
            ),
            tokenizer=TokenizerConfig(kind="bytes", num_sentinels=0),
            layout=layout,
            mixture=(Supervised(name="retrieval"),),
            example_mode="documents",
            # Pairs, "?", the letter and EOS; the digit and EOS. So each row has one text.
            inputs_length=2 * PAIRS + 3,
            targets_length=2,
            store_dir=str(folder / "stores"),
        ),
        training=TrainingConfig(
            num_train_steps=1,
            global_batch_size=64,
            optimizer=MuonConfig(),
            schedule=ScheduleConfig(kind="cosine", learning_rate=0.012, warmup_steps=50, final_fraction=0.1),
        ),
        checkpoints=CheckpointConfig(save_every_steps=500),
        evaluation=EvaluationConfig(every_steps=50, num_batches=15),
        monitoring=MonitoringConfig(writers=(), num_decoded_samples=0),
    )


def _write(folder: Path) -> None:
    """Write the same random texts in each order, and other texts to hold out."""
    rng = random.Random(0)
    held_out = [_fields(rng) for _ in range(1_000)]
    seen = {fields["pairs"] for fields in held_out}
    train = [fields for _ in range(100_000) if (fields := _fields(rng))["pairs"] not in seen]
    for order, form in ORDERS.items():
        for split, texts in (("train", train), ("validation", held_out)):
            path = folder / f"{order}.{split}.jsonl"
            if not path.exists():
                rows = ({"text": form.format_map(fields), "answer": fields["answer"]} for fields in texts)
                write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def _fields(rng: random.Random) -> dict[str, str]:
    letters, digits = rng.sample(LETTERS, PAIRS), rng.sample(DIGITS, PAIRS)
    asked = rng.randrange(PAIRS)
    both = list(zip(letters, digits, strict=True))
    return {
        "pairs": "".join(letter + digit for letter, digit in both),
        "swapped": "".join(digit + letter for letter, digit in both),
        "question": f"?{letters[asked]}",
        "answer": digits[asked],
    }
