"""Heads and text-to-text on real text: which package of the standard library a docstring is from."""

import asyncio
import collections
import dataclasses
import email
import json
import logging
import multiprocessing
import random
import unittest
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from t5x_like.cli import main
from t5x_like.config import (
    EXIT_OK,
    AdamW,
    CorpusConfig,
    DataConfig,
    EvaluationConfig,
    Labelled,
    ModelConfig,
    MonitoringConfig,
    RunConfig,
    Schedule,
    StackConfig,
    Supervised,
    TaskHead,
    TokenizerConfig,
    TrainingConfig,
)
from t5x_like.config.validate import validate
from t5x_like.data.docstrings import read_all
from t5x_like.data.prepare import prepare
from t5x_like.data.validation import objective_batches
from t5x_like.decoding.generate import generate_tokens
from t5x_like.decoding.prompts import prompt_format
from t5x_like.decoding.trained import open_trained
from t5x_like.trainer import train

pytestmark = pytest.mark.slow

PACKAGES = {module.__name__: module for module in (asyncio, email, logging, multiprocessing, unittest)}
LABELS = tuple(PACKAGES)
STEPS = {"head": 120, "text": 200}


def docstrings_of(module) -> list[str]:
    folder = Path(module.__file__).parent
    return [text for texts in read_all(sorted(folder.rglob("*.py"))) for text in texts if len(text) > 20]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with docstrings.jsonl: {"text", "label"}, no text twice."""
    folder = tmp_path_factory.mktemp("fine_tuning")
    rows = {text: name for name, module in PACKAGES.items() for text in docstrings_of(module)}
    pairs = sorted(rows.items())
    random.Random(0).shuffle(pairs)
    lines = [json.dumps({"text": text, "label": label}) for text, label in pairs]
    (folder / "docstrings.jsonl").write_text("\n".join(lines))
    return folder


def recipe(place, layout, mixture, *, targets_length, steps, head=None) -> RunConfig:
    stack = StackConfig(num_layers=1, d_model=64, num_heads=4, num_kv_heads=4, head_dim=16, d_ff=128, positions="rope")
    return RunConfig(
        name="docstrings",
        model=ModelConfig(
            encoder=stack,
            decoder=stack if layout == "encoder_decoder" else None,
            vocab_size=1040,
            embedding_stddev=0.3,
            task_head=head,
        ),
        data=DataConfig(
            corpus=CorpusConfig(
                files=(str(place / "docstrings.jsonl"),),
                inputs_field="text",
                text_field="label",
                target_kind="label",
                labels=LABELS,
                validation_fraction=0.2,
            ),
            tokenizer=TokenizerConfig(vocab_size=1024, num_sentinels=8),
            layout=layout,
            mixture=mixture,
            examples="documents" if targets_length else "windows",
            inputs_length=64,
            targets_length=targets_length,
            store=str(place / "stores"),
        ),
        training=TrainingConfig(
            num_train_steps=steps,
            batch_size=16,
            optimizer=AdamW(weight_decay=0.0),
            schedule=Schedule(kind="constant", learning_rate=3e-3, warmup_steps=10),
        ),
        evaluation=EvaluationConfig(num_batches=40),
        monitoring=MonitoringConfig(log_every_steps=20, tensorboard=False, samples=4),
    )


@pytest.fixture(scope="module")
def classifier(place):
    head = TaskHead(kind="classification", labels=LABELS, pooling="mean", dropout_rate=0.1)
    run = recipe(place, "encoder", (Labelled(kind="classification"),), targets_length=0, steps=STEPS["head"], head=head)
    assert not validate(run)
    prepare(run.data, report=lambda line: None)
    train(run, place / "classifier")
    return place / "classifier"


def test_a_classification_head_beats_the_majority_by_far(classifier):
    scores = json.loads((classifier / "evaluation.json").read_text())["objectives"]["head"]
    assert scores["accuracy"] > scores["majority"] + 0.25
    assert scores["f1_macro"] > 0.5
    samples = json.loads((classifier / "samples.json").read_text())
    assert {sample["targets"] for sample in samples} <= set(LABELS) and len(samples) == 4


def test_text_to_text_beats_the_majority_by_far(place):
    run = recipe(place, "encoder_decoder", (Supervised(),), targets_length=8, steps=STEPS["text"])
    assert not validate(run)
    prepare(run.data, report=lambda line: None)
    run = dataclasses.replace(run, evaluation=EvaluationConfig(num_batches=1))
    train(run, place / "text")
    trained = open_trained(place / "text")
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
    said = [
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
    accuracy = np.mean([a == b for a, b in zip(said, wanted, strict=True)])
    print(f"text-to-text: accuracy {accuracy:.3f}, majority {majority:.3f}, of {len(wanted)}")
    assert accuracy > majority + 0.2


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
    "text, told",
    [
        ('{"text": "a"}\n{"txt": "b"}', "texts.jsonl:2: found the fields 'txt'"),
        ('{"text": "a"}\n\n{"text": 3}', "texts.jsonl:3: found 'text' of type int"),
        ('{"text": " "}', "texts.jsonl:1: found a blank text"),
        ("nothing", "texts.jsonl:1: found no JSON"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ("", "found no text"),
    ],
)
def test_bad_input_is_refused_with_its_line_and_nothing_is_written(tmp_path, capsys, text, told):
    (tmp_path / "texts.jsonl").write_text(text)
    code = main(["embed", str(tmp_path), "--input", str(tmp_path / "texts.jsonl"), "--output", str(tmp_path / "x.npy")])
    assert code != EXIT_OK and told in capsys.readouterr().err
    assert not (tmp_path / "x.npy").exists()
