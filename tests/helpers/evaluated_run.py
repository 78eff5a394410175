"""Run directory with several checkpoints of random parameters, and a seqio Task over its vocabulary.

Imported as a module of Tasks, it registers the Task `reverse` with synthetic examples.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

WORDS = "red green blue yellow one two three four".split()
EXAMPLES = 150


def make(directory: Path, steps: tuple[int, ...]) -> Path:
    """Write a run with checkpoints of the steps, and return its directory."""
    import jax
    import numpy as np

    from t5x_like.checkpoints.manager import CheckpointManager
    from t5x_like.config import (
        CheckpointConfig,
        CorpusConfig,
        DataConfig,
        EvaluationConfig,
        ModelConfig,
        PrefixLM,
        RunConfig,
        ShardingConfig,
        StackConfig,
        TokenizerConfig,
        TrainingConfig,
    )
    from t5x_like.config.serialization import to_json
    from t5x_like.data.store.prepare import open_stores, prepare
    from t5x_like.data.stream.row_stream import TrainingStream
    from t5x_like.program import build_program

    texts, run_dir = directory / "texts", directory / "run"
    texts.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(24):
        (texts / f"{number}.txt").write_text(" ".join(rng.choice(WORDS, 160)))
    stack = StackConfig(num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=48)
    run = RunConfig(
        name="random",
        model=ModelConfig(encoder=stack, decoder=stack, vocab_size=288),
        data=DataConfig(
            corpus=CorpusConfig(files=(str(texts / "*.txt"),), validation_fraction=0.4),
            tokenizer=TokenizerConfig(kind="bytes", num_sentinels=16),
            layout="encoder_decoder",
            mixture=(PrefixLM(name="S", mode="S"),),
            inputs_length=24,
            targets_length=12,
            store_dir=str(directory / "stores"),
        ),
        training=TrainingConfig(num_train_steps=max(steps), global_batch_size=4),
        sharding=ShardingConfig(fsdp=1, data=1),
        checkpoints=CheckpointConfig(max_to_keep=len(steps)),
        evaluation=EvaluationConfig(num_batches=2),
    )
    prepare(run.data, report=lambda line: None)
    program = build_program(run, jax.devices()[:1])
    manager = CheckpointManager(run_dir / "checkpoints", run.checkpoints)
    meta = {"data": {"rows": 0, "fingerprint": TrainingStream(open_stores(run.data), run.data, 4).fingerprint}}
    for step in steps:
        seeded = dataclasses.replace(run, training=dataclasses.replace(run.training, seed=step))
        manager.save(step, build_program(seeded, jax.devices()[:1]).init(), meta)
    manager.close()
    del program
    (run_dir / "config.json").write_text(to_json(run))
    (run_dir / "exit.json").write_text(json.dumps({"code": 0, "reason": "finished"}))
    return run_dir


def first_letters(targets: Any, predictions: Any) -> dict[str, float]:
    same = [target[:1] == prediction[:1] for target, prediction in zip(targets, predictions, strict=True)]
    return {"first_letter": 100 * sum(same) / len(same), "said": len(set(predictions))}


def mean_score(targets: Any, scores: Any) -> dict[str, float]:
    return {"score": float(sum(scores) / len(targets))}


def register() -> None:
    """Register the Task `reverse`: words, and the words backwards. Some examples occur twice."""
    import seqio
    import tensorflow as tf

    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del split, shuffle_files, seed
        rows = [f"{WORDS[i % 8]} {i % 140}" for i in range(EXAMPLES)]
        return tf.data.Dataset.from_tensor_slices({"inputs": rows, "targets": [row[::-1] for row in rows]})

    feature = seqio.Feature(seqio.ByteVocabulary(extra_ids=16), add_eos=True)
    seqio.TaskRegistry.add(
        "reverse",
        source=seqio.FunctionDataSource(dataset, splits=("validation",)),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        output_features={"inputs": feature, "targets": feature},
        metric_fns=[first_letters, mean_score],
    )


if __name__ == "helpers.evaluated_run":
    import sys

    if "seqio" in sys.modules:  # Imported as the Task's module, by a process that evaluates it.
        register()
