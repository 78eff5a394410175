"""Runs over mixtures: several shapes of rows in a step, several corpora, packed pairs, another batch size."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config import (
    CheckpointConfig,
    CorpusConfig,
    CorpusShareConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    MonitoringConfig,
    PrefixLM,
    RunConfig,
    ScheduleConfig,
    SpanCorruption,
    StackConfig,
    Supervised,
    TokenizerConfig,
    TrainingConfig,
)
from t5x_like.config.validation import validate
from t5x_like.data.store.prepare import prepare
from t5x_like.errors import SafetyError
from t5x_like.evaluation.evaluate_runs import evaluate_checkpoints
from t5x_like.evaluation.options import EvalOptions
from t5x_like.reports.run_report import write_report
from t5x_like.trainer.train import train

pytestmark = pytest.mark.slow


def small_run(root: Path, data: DataConfig, batch_size: int, steps: int) -> RunConfig:
    stack = StackConfig(num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=64, positions="rope")
    encoder = stack if data.layout == "encoder_decoder" else None
    return RunConfig(
        name="mixture",
        model=ModelConfig(encoder=encoder, decoder=stack, vocab_size=384, tie_embeddings=True, embedding_stddev=0.2),
        data=dataclasses.replace(data, store_dir=str(root / "stores")),
        training=TrainingConfig(
            num_train_steps=steps,
            global_batch_size=batch_size,
            schedule=ScheduleConfig(kind="constant", learning_rate=1e-2),
        ),
        checkpoints=CheckpointConfig(save_every_steps=1000),
        evaluation=EvaluationConfig(num_batches=1),
        monitoring=MonitoringConfig(log_every_steps=2, writers=(), num_decoded_samples=1),
    )


def position(workdir: Path, run: RunConfig) -> int:
    checkpoints = CheckpointManager(workdir / "checkpoints", run.checkpoints, read_only=True)
    newest = checkpoints.latest()
    assert newest is not None
    return int(checkpoints.read_meta(newest)["data"]["rows"])


def records(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_two_shapes_and_another_batch_size_on_the_way(tmp_path: Path) -> None:
    data = DataConfig(
        corpus=CorpusConfig(packages=False, max_documents=40, validation_fraction=0.1),
        tokenizer=TokenizerConfig(kind="bytes", num_sentinels=32),
        layout="encoder_decoder",
        mixture=(
            SpanCorruption(name="short", mode="R"),
            SpanCorruption(name="long", mode="X", noise_density=0.5),
            PrefixLM(name="S", mode="S", max_target_fraction=1.0, complementary_pairs=True),
        ),
        inputs_length=64,
        targets_length=64,
        targets_length_buckets=(24,),
    )
    run = small_run(tmp_path, data, batch_size=24, steps=4)
    assert validate(run) == []
    uneven = dataclasses.replace(run, training=dataclasses.replace(run.training, global_batch_size=25))
    (problem,) = validate(uneven)
    assert problem.where == "training.global_batch_size" and "2 main, 1 targets_24" in problem.expected
    prepare(run.data, report=lambda line: None)
    workdir = tmp_path / "run"
    assert train(run, workdir) == 0
    assert position(workdir, run) == 96

    larger = dataclasses.replace(
        run, training=dataclasses.replace(run.training, global_batch_size=48, num_train_steps=6)
    )
    with pytest.raises(SafetyError, match="--allow-change"):
        train(larger, workdir)
    assert train(larger, workdir, ["training.global_batch_size"]) == 0
    assert position(workdir, larger) == 192
    epochs = [record["epochs/python_docs"] for record in records(workdir)]
    assert epochs[0] == pytest.approx(epochs[1] / 2) and epochs[2] == pytest.approx(2 * epochs[1])
    assert {"loss/short", "loss/long", "loss/S"} <= records(workdir)[-1].keys()


@pytest.mark.parametrize("layout", ["encoder_decoder", "prefix_lm"])
def test_text_and_packed_pairs_in_one_step(tmp_path: Path, layout: str) -> None:
    pairs = tmp_path / "pairs.jsonl"
    lines = ({"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(400))
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sums = CorpusConfig(files=(str(pairs),), inputs_field="question", text_field="answer")
    docs = CorpusConfig(packages=False, max_documents=40, validation_fraction=0.1)
    data = DataConfig(
        corpora=(
            CorpusShareConfig(name="docs", corpus=docs),
            CorpusShareConfig(name="sums", corpus=sums, mixture=(Supervised(name="sums"),), example_mode="documents"),
        ),
        tokenizer=TokenizerConfig(kind="bytes", num_sentinels=32),
        layout=layout,
        mixture=(SpanCorruption(name="spans"), PrefixLM(name="prefix")),
        inputs_length=64,
        targets_length=64,
    )
    run = small_run(tmp_path, data, batch_size=8, steps=4)
    assert validate(run) == []
    prepare(run.data, report=lambda line: None)
    workdir = tmp_path / "run"
    assert train(run, workdir) == 0
    last = records(workdir)[-1]
    assert {"loss/spans", "loss/prefix", "loss/sums", "epochs/docs", "epochs/sums"} <= last.keys()
    # Pairs of some ten bytes each: several to a row, so that an epoch of them is few rows.
    assert 4 * 4 / 400 < last["epochs/sums"]
    scores = json.loads((workdir / "evaluation.json").read_text())["objectives"]
    assert set(scores) == {"docs/spans", "docs/prefix", "sums/sums"} and scores["sums/sums"]["tokens"] > 0
    assert (
        evaluate_checkpoints(
            [CheckpointRef(workdir)],
            EvalOptions(num_batches=1),
            write_report=write_report,
            output=tmp_path / "scores.json",
        )
        == 0
    )
