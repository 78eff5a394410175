"""seqio Tasks of a run's configuration are evaluated during training, and by a process that follows the run."""

from __future__ import annotations

import json

import pytest
from helpers.small_run import small_run

from t5x_like.cli.main import main
from t5x_like.config import (
    CheckpointConfig,
    CorpusConfig,
    EvaluationConfig,
    EvaluationTask,
    MonitoringConfig,
    PrefixLM,
    ScheduleConfig,
)
from t5x_like.config.serialization import from_json, to_json
from t5x_like.data.store.prepare import prepare
from t5x_like.evaluation import text_metrics
from t5x_like.trainer.train import train

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
            metric_fns=[text_metrics.accuracy],
        )


def test_tasks_are_evaluated_during_and_after_training(tmp_path):
    register()
    (tmp_path / "texts").mkdir()
    for number in range(20):
        (tmp_path / "texts" / f"{number}.txt").write_text("a b c d e f g " * 12)
    run = small_run(
        tmp_path,
        "prefix_lm",
        (PrefixLM(name="S", mode="S"),),
        corpus=CorpusConfig(files=(str(tmp_path / "texts" / "*.txt"),), validation_fraction=0.3),
        lengths=(24, 12),
        stack={"d_ff": 48, "positions": "relative_bias"},
        training={"schedule": ScheduleConfig(kind="constant", learning_rate=1e-3)},
        name="with_tasks",
        checkpoints=CheckpointConfig(save_every_steps=2),
        evaluation=EvaluationConfig(
            every_steps=2, num_batches=1, tasks=(EvaluationTask(mixture_or_task="copy", num_examples=5),)
        ),
        monitoring=MonitoringConfig(num_decoded_samples=0),
    )
    assert from_json(to_json(run), source="config.json") == run
    prepare(run.data, report=lambda line: None)
    workdir = tmp_path / "run"

    def recorded() -> dict:
        return {one["step"]: one for one in map(json.loads, (workdir / "evaluations.jsonl").read_text().splitlines())}

    assert train(run, workdir) == 0
    during = recorded()
    assert {step: list(one["tasks"]) for step, one in during.items()} == {2: ["copy"], 4: ["copy"]}
    assert all(one["tasks"]["copy"]["examples"] == 5 for one in during.values())
    assert all("S" in one["objectives"] for one in during.values())
    assert len((workdir / "evaluations" / "4" / "copy.jsonl").read_text().splitlines()) == 5
    assert list((workdir / "tensorboard" / "evaluation").iterdir())
    assert "copy" in (workdir / "report.html").read_text()

    # A Task that training did not evaluate is added to the steps; existing results are not computed again.
    follow = ["eval", str(workdir), "--follow", "--task", "copy_again", "--no-intervals"]
    assert main(follow) == 0
    after = recorded()
    assert {step: sorted(one["tasks"]) for step, one in after.items()} == {s: ["copy", "copy_again"] for s in (2, 4)}
    assert all(after[step]["tasks"]["copy"] == one["tasks"]["copy"] for step, one in during.items())
    assert all(one["tasks"]["copy_again"]["examples"] == 7 for one in after.values())
    before = (workdir / "evaluations.jsonl").stat().st_mtime_ns
    assert main(follow) == 0
    assert (workdir / "evaluations.jsonl").stat().st_mtime_ns == before, "every step is evaluated once"
