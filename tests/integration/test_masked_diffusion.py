"""An encoder trained by masked diffusion: its bound on held-out text, and minimal pairs, by the command line."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from helpers.small_run import small_run

from t5x_like.cli.main import main
from t5x_like.config import CorpusConfig, MaskedDiffusion, ScheduleConfig
from t5x_like.data.store.prepare import prepare
from t5x_like.errors import EXIT_OK, EXIT_USAGE
from t5x_like.trainer.train import train

pytestmark = pytest.mark.slow

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on documents that repeat the alphabet: one visible letter determines all others."""
    root = tmp_path_factory.mktemp("diffusion")
    (root / "texts").mkdir()
    shift = random.Random(0)
    for number in range(60):
        first = shift.randrange(26)
        (root / "texts" / f"{number}.txt").write_text("".join(ALPHABET[(first + i) % 26] for i in range(300)))
    run = small_run(
        root,
        "encoder",
        (MaskedDiffusion(),),
        corpus=CorpusConfig(files=(str(root / "texts" / "*.txt"),), validation_fraction=0.2),
        lengths=(24, 0),
        stack={"num_layers": 2},
        model={"embedding_stddev": 0.2},
        training={
            "num_train_steps": 120,
            "global_batch_size": 16,
            "schedule": ScheduleConfig(kind="cosine", learning_rate=1e-2, warmup_steps=20),
        },
    )
    prepare(run.data, report=lambda line: None)
    assert train(run, root / "run") == EXIT_OK
    return root / "run"


def test_the_bound_of_held_out_text_is_learned(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(trained)]) == EXIT_OK
    assert "given the first half: upper bound" in capsys.readouterr().out
    result = json.loads((trained / "evaluation.json").read_text())
    bound = result["diffusion_bound"]["bits_per_byte"]
    # Letters alone have log2(26) bits. Given the first half, all that is left are the ends of documents.
    assert bound < 0.5 * result["baselines"]["unigram_bits_per_byte"]
    low, high = result["intervals"]["bits_per_byte_bound"]
    assert low <= bound <= high
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    # The weights of a row sum to its length, so that a step of 16 rows of 24 tokens has 384.
    assert records[-1]["loss_tokens"] == pytest.approx(384, rel=1e-4)
    assert records[-1]["loss"] < 0.6 * records[0]["loss"]


def test_pairs_are_told_apart(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = []
    for first in range(24):
        good = "".join(ALPHABET[(first + i) % 26] for i in range(16))
        pairs.append({"good": good, "bad": good[:8] + good[9] + good[8] + good[10:]})
    file, output = tmp_path / "pairs.jsonl", tmp_path / "scores.json"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for scoring in ("pseudo_likelihood", "diffusion_bound"):
        command = ["eval", str(trained), "--pairs", str(file), "--pairs-score", scoring, "--output", str(output)]
        assert main(command) == EXIT_OK
        found = json.loads(output.read_text())
        assert found["num_pairs"] == 24 and found["scoring"] == scoring and found["accuracy"] > 0.9
        assert found["interval"][0] > 0.5
    capsys.readouterr()
    file.write_text('{"good": "a"}\n')
    assert main(["eval", str(trained), "--pairs", str(file)]) == EXIT_USAGE
    assert "pairs.jsonl:1: found no field 'bad'" in capsys.readouterr().err
