"""Heads, text-to-text and the answers of a teacher on real text: which package of the standard library a docstring is
from, and which of its words are arguments of the function."""

import asyncio
import collections
import dataclasses
import email
import json
import logging
import multiprocessing
import random
import subprocess
import sys
import unittest
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from helpers.docs_examples import blocks

from t5x_like.cli.main import main
from t5x_like.config import (
    AdamWConfig,
    CorpusConfig,
    DataConfig,
    EvaluationConfig,
    LabeledExamples,
    ModelConfig,
    MonitoringConfig,
    RunConfig,
    ScheduleConfig,
    StackConfig,
    Supervised,
    TaskHeadConfig,
    TokenizerConfig,
    TrainingConfig,
)
from t5x_like.config.validation import validate
from t5x_like.data.sources.python_docs import read_all
from t5x_like.data.store.prepare import prepare
from t5x_like.data.stream.heldout import objective_batches
from t5x_like.decoding.engine import generate_tokens
from t5x_like.decoding.prompt_format import prompt_format
from t5x_like.errors import EXIT_OK
from t5x_like.model_loading import open_model
from t5x_like.trainer.train import train

pytestmark = pytest.mark.slow

PACKAGES = {module.__name__: module for module in (asyncio, email, logging, multiprocessing, unittest)}
LABELS = tuple(PACKAGES)
STEPS = {"head": 120, "text": 200}


def docstrings_of(module) -> list[str]:
    folder = Path(module.__file__).parent
    return [text for texts in read_all(sorted(folder.rglob("*.py"))) for text in texts if len(text) > 20]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Create a folder with docstrings.jsonl: {"text", "label"}, no text twice."""
    folder = tmp_path_factory.mktemp("fine_tuning")
    rows = {text: name for name, module in PACKAGES.items() for text in docstrings_of(module)}
    pairs = sorted(rows.items())
    random.Random(0).shuffle(pairs)
    lines = [json.dumps({"text": text, "label": label}) for text, label in pairs]
    (folder / "docstrings.jsonl").write_text("\n".join(lines))
    return folder


def recipe(root, layout, mixture, *, targets_length, steps, head=None, d_ff=128) -> RunConfig:
    stack = StackConfig(num_layers=1, d_model=64, num_heads=4, num_kv_heads=4, head_dim=16, d_ff=d_ff, positions="rope")
    return RunConfig(
        name="docstrings",
        model=ModelConfig(
            encoder=None if layout == "causal_lm" else stack,
            decoder=None if layout == "encoder" else stack,
            vocab_size=1040,
            embedding_stddev=0.3,
            task_head=head,
        ),
        data=DataConfig(
            corpus=CorpusConfig(
                files=(str(root / "docstrings.jsonl"),),
                inputs_field="text",
                text_field="label",
                target_kind="label",
                labels=LABELS,
                validation_fraction=0.2,
            ),
            tokenizer=TokenizerConfig(vocab_size=1024, num_sentinels=8),
            layout=layout,
            mixture=mixture,
            example_mode="documents" if targets_length else "windows",
            inputs_length=64,
            targets_length=targets_length,
            store_dir=str(root / "stores"),
        ),
        training=TrainingConfig(
            num_train_steps=steps,
            global_batch_size=16,
            optimizer=AdamWConfig(weight_decay=0.0),
            schedule=ScheduleConfig(kind="constant", learning_rate=3e-3, warmup_steps=10),
        ),
        evaluation=EvaluationConfig(num_batches=40),
        monitoring=MonitoringConfig(log_every_steps=20, writers=(), num_decoded_samples=4),
    )


@pytest.fixture(scope="module")
def classifier(root):
    head = TaskHeadConfig(kind="classification", labels=LABELS, pooling="mean", dropout_rate=0.1)
    run = recipe(
        root, "encoder", (LabeledExamples(kind="classification"),), targets_length=0, steps=STEPS["head"], head=head
    )
    assert not validate(run)
    prepare(run.data, report=lambda line: None)
    train(run, root / "classifier")
    return root / "classifier"


def test_a_classification_head_beats_the_majority_by_far(classifier):
    scores = json.loads((classifier / "evaluation.json").read_text())["objectives"]["head"]
    assert 100 * scores["accuracy"] > scores["majority"] + 25
    assert scores["f1_macro"] > 50
    samples = json.loads((classifier / "samples.json").read_text())
    assert {sample["targets"] for sample in samples} <= set(LABELS) and len(samples) == 4


def test_predictions_of_a_file_score_as_the_evaluation_of_training(classifier, tmp_path):
    """The held-out texts as a file: `predict` and `eval --data` read them as training has laid them out."""
    trained = open_model(classifier)
    split, tokenizer = trained.store.split("validation"), trained.store.tokenizer
    bounds = split.offsets.astype(int)
    rows = [
        {"text": tokenizer.decode(split.tokens(*text)), "label": tokenizer.decode(split.tokens(*label))}
        for text, label in zip(
            zip(bounds[:-1:2], bounds[1::2], strict=False), zip(bounds[1::2], bounds[2::2], strict=True), strict=True
        )
    ]
    source, output = tmp_path / "held_out.jsonl", tmp_path / "predictions.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["predict", str(classifier), "--input", str(source), "--output", str(output)]) == EXIT_OK
    predictions = [json.loads(line) for line in output.read_text().splitlines()]
    accuracy = np.mean([row["prediction"] == row["label"] for row in predictions])
    scores = json.loads((classifier / "evaluation.json").read_text())["objectives"]["head"]
    assert accuracy == pytest.approx(scores["accuracy"], abs=0.01)
    assert main(["eval", str(classifier), "--data", str(source), "--output", str(tmp_path / "scores.json")]) == EXIT_OK
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["metrics"]["accuracy/accuracy"] == pytest.approx(100 * accuracy)
    low, high = found["intervals"]["accuracy/accuracy"]
    assert low < 100 * accuracy < high


def text_run(root, layout) -> Path:
    """Return the run that generates the packages of docstrings."""
    run = recipe(root, layout, (Supervised(),), targets_length=8, steps=STEPS["text"])
    assert not validate(run)
    directory = root / f"text_{layout}"
    if not directory.exists():
        prepare(run.data, report=lambda line: None)
        train(dataclasses.replace(run, evaluation=EvaluationConfig(num_batches=1)), directory)
    return directory


def test_text_to_text_beats_the_majority_by_far(root):
    trained = open_model(text_run(root, "encoder_decoder"))
    run = trained.run
    _, params = trained.params()
    form = prompt_format(run.data, None)
    inputs, wanted = [], []
    data = run.data
    for batch in objective_batches(trained.store, data, data.sources[0], 16, data.mixture[0], 12):
        for row, target in zip(
            batch["main"]["encoder_input_tokens"], batch["main"]["decoder_target_tokens"], strict=True
        ):
            if row.any():
                inputs.append(row[row != 0].tolist())
                wanted.append(trained.store.tokenizer.decode(target[target != 0].tolist()))
    answers = [
        trained.store.tokenizer.decode(ids)
        for start in range(0, len(inputs), 64)
        for ids in generate_tokens(
            trained.program,
            params,
            inputs[start : start + 64],
            allowed_V=form.allowed(trained.store.vocabulary, run.model.vocab_size),
            max_new_tokens=8,
            bidirectional=form.bidirectional,
        )
    ]
    majority = collections.Counter(wanted).most_common(1)[0][1] / len(wanted)
    accuracy = np.mean([a == b for a, b in zip(answers, wanted, strict=True)])
    print(f"text-to-text: accuracy {accuracy:.3f}, majority {majority:.3f}, of {len(wanted)}")
    assert accuracy > majority + 0.2


@pytest.mark.parametrize("layout", ["encoder_decoder", pytest.param("causal_lm", marks=pytest.mark.extended)])
def test_a_student_answers_as_the_teacher_whose_answers_it_has_read(root, layout, tmp_path):
    """Sequence-level distillation: the lines that `generate` writes are the pairs of a smaller model."""
    teacher, answers = text_run(root, layout), tmp_path / "answers.jsonl"
    rows = [json.loads(line)["text"][:150] for line in (root / "docstrings.jsonl").read_text().splitlines()]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in dict.fromkeys(rows)))
    command = ["generate", str(teacher), "--input", str(prompts), "--output", str(answers), "--raw-text"]
    assert main([*command, "--max-new-tokens", "8", "--return-scores"]) == EXIT_OK
    lines = answers.read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[200:]))
    (tmp_path / "unseen.jsonl").write_text("".join(lines[:200]))
    unseen = [json.loads(line) for line in lines[:200]]
    assert sum(row["ended_by"] == "eos" for row in unseen) > 150

    run = recipe(root, layout, (Supervised(),), targets_length=8, steps=STEPS["text"], d_ff=32)
    files = {"files": (str(tmp_path / "train.jsonl"),), "validation_files": (str(tmp_path / "unseen.jsonl"),)}
    corpus = CorpusConfig(**files, inputs_field="prompt", text_field="output")
    run = dataclasses.replace(
        run, data=dataclasses.replace(run.data, corpus=corpus), evaluation=EvaluationConfig(num_batches=1)
    )
    prepare(run.data, report=lambda line: None)
    train(run, tmp_path / "student")
    scores = tmp_path / "scores.json"
    command = ["eval", str(tmp_path / "student"), "--data", str(tmp_path / "unseen.jsonl"), "--output", str(scores)]
    assert main([*command, "--metrics", "accuracy", "--no-intervals"]) == EXIT_OK
    agreement = json.loads(scores.read_text())["metrics"]["accuracy/accuracy"]
    majority = collections.Counter(row["output"] for row in unseen).most_common(1)[0][1] / 2
    print(
        f"{layout}: the student agrees with the teacher in {agreement:.1f} %, its majority answer in {majority:.1f} %"
    )
    assert agreement > majority + 15


def test_arguments_and_constants_are_found_in_docstrings(classifier, tmp_path):
    """The data of docs/finetune.md, with as many steps as learning takes."""
    for block in blocks("docs/finetune.md"):
        if block.file_name in ("functions.py", "make_tags.py"):
            (tmp_path / block.file_name).write_text(block.text)
    subprocess.run([sys.executable, "make_tags.py"], cwd=tmp_path, check=True)
    command = ["train", "finetune:tag", "--from", str(classifier), "--workdir", str(tmp_path / "run")]
    command += ["--data.corpus.files", str(tmp_path / "tags_train.jsonl"), "--data.store-dir", str(tmp_path / "stores")]
    command += ["--data.corpus.validation-files", str(tmp_path / "tags_dev.jsonl"), "--data.inputs-length", "96"]
    command += ["--data.corpus.labels", "O", "B-ARGUMENT", "B-CONSTANT", "B-RFC", "I-RFC"]
    command += ["--training.num-train-steps", "150", "--evaluation.num-batches", "1"]
    command += ["--monitoring.num-decoded-samples", "0"]
    assert main([*command, "--training.schedule.learning-rate", "3e-3"]) == EXIT_OK
    scores, output = tmp_path / "scores.json", tmp_path / "predictions.jsonl"
    source = str(tmp_path / "tags_test.jsonl")
    assert main(["eval", str(tmp_path / "run"), "--data", source, "--output", str(scores), "--no-intervals"]) == EXIT_OK
    found = json.loads(scores.read_text())["metrics"]
    print(found)
    # A model that says O for every word has the accuracy of the majority, and no entity.
    assert found["entity_f1/f1"] > 25 and found["entity_f1/precision"] > 50
    assert main(["predict", str(tmp_path / "run"), "--input", source, "--output", str(output)]) == EXIT_OK
    spans = [span for line in output.read_text().splitlines() for span in json.loads(line)["spans"]]
    constants = [span["text"].strip("`'\"*.,:;()") for span in spans if span["label"] == "CONSTANT"]
    assert sum(text in ("None", "True", "False") for text in constants) > len(constants) / 2 > 0


def test_embeddings_stand_in_the_order_of_the_texts(classifier, tmp_path):
    lines = [json.dumps({"text": "a task " * number}) for number in (1, 30, 2, 5, 1)]
    (tmp_path / "texts.jsonl").write_text("\n".join([lines[0], "", *lines[1:]]) + "\n")
    arguments = ["embed", str(classifier), "--input", str(tmp_path / "texts.jsonl"), "--output"]
    assert main([*arguments, str(tmp_path / "x.npy")]) == EXIT_OK
    assert main([*arguments, str(tmp_path / "x.parquet"), "--normalize", "yes"]) == EXIT_OK
    vectors = np.load(tmp_path / "x.npy")
    assert vectors.shape == (5, 64) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors[0], vectors[4], rtol=1e-5)
    assert np.abs(vectors[0] - vectors[2]).max() > 1e-3
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet").to_pydict()
    assert table["text"] == [json.loads(line)["text"] for line in lines]
    expected = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(np.array(table["embedding"]), expected, atol=1e-5)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"text": "a"}\n{"txt": "b"}', "texts.jsonl:2: found the fields 'txt'"),
        ('{"text": "a"}\n\n{"text": 3}', "texts.jsonl:3: found 'text' of type int"),
        ('{"text": " "}', "texts.jsonl:1: found a blank text"),
        ("nothing", "texts.jsonl:1: found no JSON"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ("", "found no text"),
    ],
)
def test_bad_input_is_refused_with_its_line_and_nothing_is_written(tmp_path, capsys, text, message):
    (tmp_path / "texts.jsonl").write_text(text)
    code = main(["embed", str(tmp_path), "--input", str(tmp_path / "texts.jsonl"), "--output", str(tmp_path / "x.npy")])
    assert code != EXIT_OK and message in capsys.readouterr().err
    assert not (tmp_path / "x.npy").exists()
