"""A run through the trainer itself: it learns, and its clock accounts for where the time went."""

from __future__ import annotations

import contextlib
import io
import json
import time
from pathlib import Path

import pytest
from helpers.small_run import small_run

from t5x_like.config import (
    AdafactorConfig,
    CheckpointConfig,
    CorpusConfig,
    EvaluationConfig,
    MonitoringConfig,
    ScheduleConfig,
    ul2,
)
from t5x_like.data.store.prepare import prepare
from t5x_like.evaluation.results_store import scalars
from t5x_like.trainer.train import train
from t5x_like.utils.formatting import number

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, str]:
    """Return a finished UL2 run on the language reference, its wall-clock seconds and what it has printed."""
    root = tmp_path_factory.mktemp("training")
    run = small_run(
        root,
        "encoder_decoder",
        ul2(),
        corpus=CorpusConfig(packages=False, max_documents=60, validation_fraction=0.1),
        lengths=(64, 64),
        num_sentinels=64,
        stack={"d_model": 64, "head_dim": 32, "d_ff": 128},
        model={"vocab_size": 384, "tie_embeddings": True, "embedding_stddev": 0.125},
        training={
            "num_train_steps": 160,
            "global_batch_size": 16,
            "optimizer": AdafactorConfig(),
            "schedule": ScheduleConfig(kind="constant", learning_rate=2e-2, warmup_steps=20),
        },
        name="learns",
        checkpoints=CheckpointConfig(save_every_steps=1000, save_every_minutes=1e-6, max_to_keep=9),
        evaluation=EvaluationConfig(every_steps=80, num_batches=2),
        monitoring=MonitoringConfig(log_every_steps=40, writers=()),
    )
    prepare(run.data, report=lambda line: None)
    start = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert train(run, root / "run") == 0
    return root / "run", time.monotonic() - start, output.getvalue()


def test_the_loss_of_every_denoiser_falls(finished: tuple[Path, float, str]) -> None:
    records = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [40, 80, 120, 160]
    denoisers = [name for name in records[0] if name.startswith("loss/")]
    assert len(denoisers) == 7
    for name in ("loss", *denoisers):
        assert records[-1][name] < records[0][name] - 0.3, name


def test_held_out_text_takes_fewer_bits_than_its_byte_entropy(finished: tuple[Path, float, str]) -> None:
    scores = json.loads((finished[0] / "evaluation.json").read_text())
    assert scores["step"] == 160
    assert scores["prefix_lm"]["bits_per_byte"] < scores["baselines"]["byte_entropy_bits_per_byte"]


def test_scores_of_each_evaluation_and_the_place_of_the_report_are_printed(finished: tuple[Path, float, str]) -> None:
    run_dir, _, output = finished
    evaluations = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert [evaluation["step"] for evaluation in evaluations] == [80, 160]
    for evaluation in evaluations:
        (line,) = [line for line in output.splitlines() if f"evaluated step {evaluation['step']}:" in line]
        for name, value in scalars(evaluation).items():
            assert name.startswith("perplexity/") or f"{name} {number(value)}" in line
    assert f"report: {run_dir / 'report.html'}" in output and (run_dir / "report.html").exists()


def test_times_sum_to_the_wall_clock_and_speed_is_computed_from_it(finished: tuple[Path, float, str]) -> None:
    directory, seconds, _ = finished
    spent = json.loads((directory / "exit.json").read_text())["seconds"]
    assert sum(spent.values()) == pytest.approx(seconds, rel=0.25)
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    stepping = sum(40 * record["step_time_s"] for record in records)
    assert stepping == pytest.approx(spent["step"] + spent["data_wait"], rel=0.1)


def test_time_since_the_last_save_makes_a_save_due_at_the_end_of_an_interval(finished: tuple[Path, float, str]) -> None:
    saved = {path.name for path in (finished[0] / "checkpoints").iterdir() if path.name.isdecimal()}
    assert saved == {"40", "80", "120", "160"}
