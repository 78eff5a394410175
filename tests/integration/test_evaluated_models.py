"""A run, the Hugging Face directory that it is written to, and what that is imported to: the same scores."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.cli import main
from t5x_like.config import (
    CheckpointConfig,
    CorpusConfig,
    DataConfig,
    EvaluationConfig,
    PrefixLM,
    RunConfig,
    SpanCorruption,
    TokenizerConfig,
    TrainingConfig,
)
from t5x_like.config.serialization import to_json
from t5x_like.data.prepare import open_stores, prepare
from t5x_like.data.stream import Stream
from t5x_like.models import presets
from t5x_like.program import assemble

pytestmark = pytest.mark.slow

WORDS = "red green blue yellow one two three four five six seven eight".split()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """T5 1.1, tiny, with random parameters and a SentencePiece vocabulary of its text."""
    place = tmp_path_factory.mktemp("models")
    (place / "texts").mkdir()
    rng = np.random.default_rng(0)
    for number in range(30):
        (place / "texts" / f"{number}.txt").write_text(" ".join(rng.choice(WORDS, 120)))
    whole = presets.t5_1_1("small", vocab_size=384)
    small = {"num_layers": 2, "d_model": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "d_ff": 48}
    run = RunConfig(
        name="tiny_t5",
        model=dataclasses.replace(
            whole,
            encoder=dataclasses.replace(whole.encoder, **small),
            decoder=dataclasses.replace(whole.decoder, **small),
        ),
        data=DataConfig(
            corpus=CorpusConfig(files=(str(place / "texts" / "*.txt"),), validation_fraction=0.3),
            tokenizer=TokenizerConfig(vocab_size=290, num_sentinels=32),
            layout="encoder_decoder",
            mixture=(
                SpanCorruption(name="R", mean_noise_span_length=3.0, noise_density=0.15),
                PrefixLM(name="S"),
            ),
            inputs_length=32,
            targets_length=16,
            store=str(place / "stores"),
        ),
        training=TrainingConfig(num_train_steps=1, batch_size=8),
        evaluation=EvaluationConfig(num_batches=2),
    )
    prepare(run.data, report=lambda line: None)
    program = assemble(run, jax.devices())
    state = program.init()
    manager = CheckpointManager(place / "run" / "checkpoints", CheckpointConfig())
    meta = {"data": {"rows": 0, "fingerprint": Stream(open_stores(run.data), run.data, 8).fingerprint}}
    manager.save(1, state, meta)
    manager.close()
    (place / "run" / "config.json").write_text(to_json(run))
    return place / "run"


def test_the_same_model_in_three_directories_has_the_same_scores(run_dir, tmp_path, capsys):
    theirs, ours, output = tmp_path / "theirs", tmp_path / "ours", tmp_path / "scores.json"
    assert main(["convert", "--to", "hf", str(run_dir), str(theirs)]) == 0
    assert main(["convert", "--from", "hf", str(theirs), str(ours)]) == 0
    before = {path: path.stat().st_mtime_ns for path in (*theirs.rglob("*"), *ours.rglob("*"))}
    recipe = str(run_dir / "config.json")
    paths = [str(run_dir), str(theirs), str(ours)]
    assert main(["eval", *paths, "--data", recipe, "--output", str(output)]) == 0
    of_run, of_theirs, of_ours = json.loads(output.read_text())
    assert [of["checkpoint"] for of in (of_run, of_theirs, of_ours)] == paths
    assert [of["step"] for of in (of_run, of_theirs, of_ours)] == [1, 0, 0]
    for other in (of_theirs, of_ours):
        for name in ("R", "S"):
            assert other["objectives"][name]["loss"] == pytest.approx(of_run["objectives"][name]["loss"], rel=1e-5)
            assert other["objectives"][name]["tokens"] == of_run["objectives"][name]["tokens"]
        assert other["prefix_lm"]["bits_per_byte"] == pytest.approx(of_run["prefix_lm"]["bits_per_byte"], rel=1e-5)
    assert {path: path.stat().st_mtime_ns for path in (*theirs.rglob("*"), *ours.rglob("*"))} == before
    rows = tmp_path / "scores.json.rows"
    lines = [(rows / f"{name}" / "held_out.jsonl").read_text() for name in ("run-1", "theirs-0", "ours-0")]
    digests = [[json.loads(row)["digest"] for row in text.splitlines()] for text in lines]
    assert digests[0] == digests[1] == digests[2]
    assert "all of them" in capsys.readouterr().out
    assert not (run_dir / "evaluations.jsonl").exists(), "the scores went to --output"


def test_what_cannot_be_scored_is_refused(run_dir, tmp_path, capsys):
    theirs = tmp_path / "theirs"
    assert main(["convert", "--to", "hf", str(run_dir), str(theirs)]) == 0
    assert main(["eval", str(theirs)]) == 2
    assert "nothing to evaluate" in capsys.readouterr().err
    assert main(["eval", f"{theirs}:3", "--data", str(run_dir / "config.json")]) == 2
    assert "a Hugging Face directory holds one model" in capsys.readouterr().err
    # Another vocabulary beside the model: its ids would be other text.
    other = tmp_path / "other"
    shutil.copytree(theirs, other)
    prepared = DataConfig(
        corpus=CorpusConfig(files=(str(run_dir.parent / "texts" / "1*.txt"),), validation_fraction=0.3),
        tokenizer=TokenizerConfig(vocab_size=285, num_sentinels=32),
        layout="encoder_decoder",
        mixture=(PrefixLM(name="S"),),
        inputs_length=32,
        targets_length=16,
        store=str(tmp_path / "stores"),
    )
    prepare(prepared, report=lambda line: None)
    (model,) = (tmp_path / "stores").glob("*/tokenizer.model")
    shutil.copyfile(model, other / "spiece.model")
    assert main(["eval", str(other), "--data", str(run_dir / "config.json")]) == 2
    assert "found another tokenizer" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "nowhere")]) == 2
    assert "no such directory" in capsys.readouterr().err
