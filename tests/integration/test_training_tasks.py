"""seqio Tasks in a run's configuration: scored at each evaluation of the training, and by a process that follows it."""

from __future__ import annotations

import json

import pytest

from t5x_like.cli import main
from t5x_like.config import (
    AdamW,
    CheckpointConfig,
    CorpusConfig,
    DataConfig,
    EvaluationConfig,
    EvaluationTask,
    ModelConfig,
    MonitoringConfig,
    PrefixLM,
    RunConfig,
    Schedule,
    StackConfig,
    TokenizerConfig,
    TrainingConfig,
)
from t5x_like.config.serialization import from_json, to_json
from t5x_like.data.prepare import prepare
from t5x_like.evaluation import metrics
from t5x_like.trainer import train

pytestmark = pytest.mark.slow
seqio = pytest.importorskip("seqio")


def register() -> None:
    import tensorflow as tf

    def dataset(split, shuffle_files, seed=None):
        del split, shuffle_files, seed
        rows = [f"{letter} {letter}" for letter in "abcdefg"]
        return tf.data.Dataset.from_tensor_slices({"inputs": rows, "targets": rows})

    feature = seqio.Feature(seqio.ByteVocabulary(extra_ids=16), add_eos=True)
    for name in ("copy", "copy_again"):
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(dataset, splits=("validation",)),
            preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
            output_features={"inputs": feature, "targets": feature},
            metric_fns=[metrics.accuracy],
        )


def test_tasks_are_scored_during_training_and_after_it(tmp_path):
    register()
    (tmp_path / "texts").mkdir()
    for number in range(20):
        (tmp_path / "texts" / f"{number}.txt").write_text("a b c d e f g " * 12)
    stack = StackConfig(num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=48)
    run = RunConfig(
        name="with_tasks",
        model=ModelConfig(encoder=None, decoder=stack, vocab_size=288),
        data=DataConfig(
            corpus=CorpusConfig(files=(str(tmp_path / "texts" / "*.txt"),), validation_fraction=0.3),
            tokenizer=TokenizerConfig(kind="bytes", num_sentinels=16),
            layout="prefix_lm",
            mixture=(PrefixLM(name="S", mode="S"),),
            inputs_length=24,
            targets_length=12,
            store=str(tmp_path / "stores"),
        ),
        training=TrainingConfig(
            num_train_steps=4,
            batch_size=8,
            optimizer=AdamW(weight_decay=0.0),
            schedule=Schedule(kind="constant", learning_rate=1e-3),
        ),
        checkpoints=CheckpointConfig(save_every_steps=2),
        evaluation=EvaluationConfig(
            every_steps=2, num_batches=1, tasks=(EvaluationTask(mixture_or_task="copy", num_examples=5),)
        ),
        monitoring=MonitoringConfig(samples=0),
    )
    assert from_json(to_json(run), source="config.json") == run
    prepare(run.data, report=lambda line: None)
    place = tmp_path / "run"

    def recorded() -> dict:
        return {one["step"]: one for one in map(json.loads, (place / "evaluations.jsonl").read_text().splitlines())}

    assert train(run, place) == 0
    during = recorded()
    assert {step: list(one["tasks"]) for step, one in during.items()} == {2: ["copy"], 4: ["copy"]}
    assert all(one["tasks"]["copy"]["examples"] == 5 for one in during.values())
    assert all("S" in one["objectives"] for one in during.values())
    assert len((place / "evaluations" / "4" / "copy.jsonl").read_text().splitlines()) == 5
    assert list((place / "tensorboard" / "evaluation").iterdir())
    assert "copy" in (place / "report.html").read_text()

    # A Task that was not asked for in training is added to the steps; what is there is not done again.
    follow = ["eval", str(place), "--follow", "--task", "copy_again", "--no-intervals"]
    assert main(follow) == 0
    after = recorded()
    assert {step: sorted(one["tasks"]) for step, one in after.items()} == {s: ["copy", "copy_again"] for s in (2, 4)}
    assert all(after[step]["tasks"]["copy"] == one["tasks"]["copy"] for step, one in during.items())
    assert all(one["tasks"]["copy_again"]["examples"] == 7 for one in after.values())
    before = (place / "evaluations.jsonl").stat().st_mtime_ns
    assert main(follow) == 0
    assert (place / "evaluations.jsonl").stat().st_mtime_ns == before, "every step is evaluated once"
