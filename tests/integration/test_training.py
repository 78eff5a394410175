"""A run through the trainer itself: it learns, and its clock accounts for where the time went."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from t5x_like.config import (
    Adafactor,
    CheckpointConfig,
    CorpusConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    MonitoringConfig,
    RunConfig,
    Schedule,
    StackConfig,
    TokenizerConfig,
    TrainingConfig,
    ul2,
)
from t5x_like.data.prepare import prepare
from t5x_like.trainer import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A finished UL2 run on the language reference and its wall-clock seconds."""
    place = tmp_path_factory.mktemp("training")
    stack = StackConfig(num_layers=1, d_model=64, num_heads=2, num_kv_heads=2, head_dim=32, d_ff=128, positions="rope")
    run = RunConfig(
        name="learns",
        model=ModelConfig(encoder=stack, decoder=stack, vocab_size=384, tie_embeddings=True, embedding_stddev=0.125),
        data=DataConfig(
            corpus=CorpusConfig(packages=False, max_documents=60, validation_fraction=0.1),
            tokenizer=TokenizerConfig(kind="bytes", num_sentinels=64),
            layout="encoder_decoder",
            mixture=ul2(),
            inputs_length=64,
            targets_length=64,
            store=str(place / "stores"),
        ),
        training=TrainingConfig(
            num_train_steps=160,
            batch_size=16,
            optimizer=Adafactor(),
            schedule=Schedule(kind="constant", learning_rate=2e-2, warmup_steps=20),
        ),
        checkpoints=CheckpointConfig(save_every_steps=1000),
        evaluation=EvaluationConfig(every_steps=80, num_batches=2),
        monitoring=MonitoringConfig(log_every_steps=40, tensorboard=False),
    )
    prepare(run.data, report=lambda line: None)
    start = time.monotonic()
    assert train(run, place / "run") == 0
    return place / "run", time.monotonic() - start


def test_the_loss_of_every_denoiser_falls(finished: tuple[Path, float]) -> None:
    records = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [40, 80, 120, 160]
    denoisers = [name for name in records[0] if name.startswith("loss/")]
    assert len(denoisers) == 7
    for name in ("loss", *denoisers):
        assert records[-1][name] < records[0][name] - 0.3, name


def test_held_out_text_takes_fewer_bits_than_its_bytes_alone_tell(finished: tuple[Path, float]) -> None:
    scores = json.loads((finished[0] / "evaluation.json").read_text())
    assert scores["step"] == 160
    assert scores["prefix_lm"]["bits_per_byte"] < scores["baselines"]["byte_entropy_bits_per_byte"]


def test_the_clock_leaves_nothing_out_and_speed_is_that_of_the_wall_clock(finished: tuple[Path, float]) -> None:
    directory, seconds = finished
    spent = json.loads((directory / "exit.json").read_text())["seconds"]
    assert sum(spent.values()) == pytest.approx(seconds, rel=0.1)
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    stepping = sum(40 * record["seconds_per_step"] for record in records)
    assert stepping == pytest.approx(spent["step"] + spent["data_wait"], rel=0.1)
