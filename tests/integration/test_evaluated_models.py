"""A run, its export to a Hugging Face directory, and the import of that have the same scores."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from t5x_like import run_directory
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.cli.main import main
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
from t5x_like.config.recipes import load_recipe
from t5x_like.config.serialization import to_json
from t5x_like.data.store.prepare import open_stores, prepare
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.models import presets
from t5x_like.program import build_program

pytestmark = pytest.mark.slow

WORDS = "red green blue yellow one two three four five six seven eight".split()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Write a run of a tiny T5 1.1 with random parameters and a SentencePiece vocabulary of its text."""
    root = tmp_path_factory.mktemp("models")
    (root / "texts").mkdir()
    rng = np.random.default_rng(0)
    for number in range(30):
        (root / "texts" / f"{number}.txt").write_text(" ".join(rng.choice(WORDS, 120)))
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
            corpus=CorpusConfig(files=(str(root / "texts" / "*.txt"),), validation_fraction=0.3),
            tokenizer=TokenizerConfig(vocab_size=290, num_sentinels=32),
            layout="encoder_decoder",
            mixture=(
                SpanCorruption(name="R", mean_noise_span_length=3.0, noise_density=0.15),
                PrefixLM(name="S"),
            ),
            inputs_length=32,
            targets_length=16,
            store_dir=str(root / "stores"),
        ),
        training=TrainingConfig(num_train_steps=1, global_batch_size=8),
        evaluation=EvaluationConfig(num_batches=2),
    )
    prepare(run.data, report=lambda line: None)
    program = build_program(run, jax.devices())
    state = program.init()
    manager = CheckpointManager(root / "run" / "checkpoints", CheckpointConfig())
    meta = {"data": {"rows": 0, "fingerprint": TrainingStream(open_stores(run.data), run.data, 8).fingerprint}}
    manager.save(1, state, meta)
    manager.close()
    (root / "run" / "config.json").write_text(to_json(run))
    return root / "run"


def test_same_model_in_three_directories_has_the_same_scores(run_dir, tmp_path, capsys):
    huggingface_dir, imported_dir, output = tmp_path / "huggingface", tmp_path / "imported", tmp_path / "scores.json"
    assert main(["convert", "--to", "hf", str(run_dir), str(huggingface_dir)]) == 0
    assert main(["convert", "--from", "hf", str(huggingface_dir), str(imported_dir)]) == 0
    before = {path: path.stat().st_mtime_ns for path in (*huggingface_dir.rglob("*"), *imported_dir.rglob("*"))}
    recipe = str(run_dir / "config.json")
    paths = [str(run_dir), str(huggingface_dir), str(imported_dir)]
    assert main(["eval", *paths, "--data", recipe, "--output", str(output)]) == 0
    of_run, of_huggingface, of_imported = json.loads(output.read_text())
    assert [scores["checkpoint"] for scores in (of_run, of_huggingface, of_imported)] == paths
    assert [scores["step"] for scores in (of_run, of_huggingface, of_imported)] == [1, 0, 0]
    for other in (of_huggingface, of_imported):
        for name in ("R", "S"):
            assert other["objectives"][name]["loss"] == pytest.approx(of_run["objectives"][name]["loss"], rel=1e-5)
            assert other["objectives"][name]["tokens"] == of_run["objectives"][name]["tokens"]
        assert other["prefix_lm"]["bits_per_byte"] == pytest.approx(of_run["prefix_lm"]["bits_per_byte"], rel=1e-5)
    assert {path: path.stat().st_mtime_ns for path in (*huggingface_dir.rglob("*"), *imported_dir.rglob("*"))} == before
    rows = tmp_path / "scores.json.rows"
    lines = [(rows / f"{name}" / "held_out.jsonl").read_text() for name in ("run-1", "huggingface-0", "imported-0")]
    digests = [[json.loads(row)["digest"] for row in text.splitlines()] for text in lines]
    assert digests[0] == digests[1] == digests[2]
    assert "all checkpoints" in capsys.readouterr().out
    assert not (run_dir / "evaluations.jsonl").exists(), "the scores went to --output"


def test_run_is_scored_on_the_data_that_is_named(run_dir, tmp_path, capsys):
    run = run_directory.read_config(run_dir)
    (model,) = (run_dir.parent / "stores").glob("*/tokenizer.model")
    (tmp_path / "text.txt").write_text("one two three four five six seven eight " * 300)
    (tmp_path / "other.txt").write_text("eight two three four five six seven one " * 200)
    corpus = CorpusConfig(files=(str(tmp_path / "*.txt"),), validation_fraction=0.5)
    tokenizer = TokenizerConfig(path=str(model), num_sentinels=32)
    data = dataclasses.replace(run.data, corpus=corpus, tokenizer=tokenizer, store_dir=str(tmp_path / "stores"))
    prepare(data, report=lambda line: None)
    recipe, output = tmp_path / "recipe.json", tmp_path / "scores.json"
    recipe.write_text(to_json(dataclasses.replace(run, data=data)))
    assert main(["eval", str(run_dir), "--data", str(recipe), "--output", str(output), "--no-intervals"]) == 0
    (held_out,) = json.loads(output.read_text())["held_out"]
    assert held_out["bytes"] == open_stores(data)[0].split("validation").num_bytes
    other = dataclasses.replace(data, tokenizer=TokenizerConfig(vocab_size=275, num_sentinels=32))
    prepare(other, report=lambda line: None)
    recipe.write_text(to_json(dataclasses.replace(run, data=other)))
    assert main(["eval", str(run_dir), "--data", str(recipe)]) == 2
    assert "found another tokenizer" in capsys.readouterr().err
    assert not (run_dir / "evaluations.jsonl").exists()


def test_prefix_lm_is_not_exported_as_a_causal_decoder(tmp_path, capsys):
    model = presets.llama_3("1b")
    data = DataConfig(layout="prefix_lm", mixture=(PrefixLM(name="S"),), inputs_length=8, targets_length=8)
    training = TrainingConfig(num_train_steps=1, global_batch_size=8)
    run = RunConfig(name="prefix", model=model, data=data, training=training)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(to_json(run))
    assert main(["convert", "--to", "hf", str(tmp_path / "run"), str(tmp_path / "out")]) == 3
    assert "found a run with data.layout prefix_lm, expected causal_lm" in capsys.readouterr().err


def test_models_that_cannot_be_scored_are_refused(run_dir, tmp_path, capsys):
    huggingface_dir = tmp_path / "huggingface"
    assert main(["convert", "--to", "hf", str(run_dir), str(huggingface_dir), "--license", "apache-2.0"]) == 0
    assert json.loads((huggingface_dir / "generation_config.json").read_text())["eos_token_id"] == 1
    card = (huggingface_dir / "README.md").read_text()
    run, (store,) = (
        load_recipe(str(run_dir / "config.json")),
        open_stores(load_recipe(str(run_dir / "config.json")).data),
    )
    assert card.startswith('---\nlicense: "apache-2.0"\n') and f"# {run.name}\n" in card
    assert f"| {store.split('train').num_documents:,} | {store.split('train').num_tokens:,} |" in card
    assert f"step 1 of {run.training.num_train_steps:,}" in card and "No evaluation of this step is recorded." in card
    assert main(["eval", str(huggingface_dir)]) == 2
    assert "nothing to evaluate" in capsys.readouterr().err
    assert main(["eval", f"{huggingface_dir}:3", "--data", str(run_dir / "config.json")]) == 2
    assert "found no checkpoint of step 3, expected one of the saved steps: 0" in capsys.readouterr().err
    # Another vocabulary in the model's directory: its ids stand for other text.
    other = tmp_path / "other"
    shutil.copytree(huggingface_dir, other)
    prepared = DataConfig(
        corpus=CorpusConfig(files=(str(run_dir.parent / "texts" / "1*.txt"),), validation_fraction=0.3),
        tokenizer=TokenizerConfig(vocab_size=285, num_sentinels=32),
        layout="encoder_decoder",
        mixture=(PrefixLM(name="S"),),
        inputs_length=32,
        targets_length=16,
        store_dir=str(tmp_path / "stores"),
    )
    prepare(prepared, report=lambda line: None)
    (model,) = (tmp_path / "stores").glob("*/tokenizer.model")
    shutil.copyfile(model, other / "spiece.model")
    assert main(["eval", str(other), "--data", str(run_dir / "config.json")]) == 2
    assert "found another tokenizer" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "nowhere")]) == 2
    assert "no such directory" in capsys.readouterr().err
