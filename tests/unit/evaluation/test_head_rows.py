"""Rows of labelled words: they add up to the scores, and are the same texts for an encoder and a decoder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.small_run import small_run

from t5x_like.config import CorpusConfig, LabeledExamples, RunConfig, TaskHeadConfig
from t5x_like.data.store.prepare import prepare
from t5x_like.evaluation.heldout_loss import evaluate_held_out, held_out_rows
from t5x_like.evaluation.per_example_loss import held_out_draws
from t5x_like.program import build_program

WORDS = 5
LABELS = ("L", "R")


def labels_run(directory: Path, layout: Any, length: int) -> RunConfig:
    corpus = CorpusConfig(
        files=(str(directory / "train.jsonl"),),
        validation_files=(str(directory / "held_out.jsonl"),),
        inputs_field="text",
        text_field="labels",
        target_kind="token_labels",
        labels=LABELS,
    )
    head = TaskHeadConfig(kind="token_classification", labels=LABELS)
    mixture = [LabeledExamples(kind="token_classification", name="labels")]
    run = small_run(
        directory, layout, mixture, corpus=corpus, lengths=(length, 0), num_sentinels=0, model={"task_head": head}
    )
    return dataclasses.replace(run, name="labels")


def rows_of(run: RunConfig, stores: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    program = build_program(run, jax.devices()[:1])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0.0, 0.3, leaf.shape).astype(np.float32), program.spec.params)
    params = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, program.abstract_params))
    result = evaluate_held_out(program, params, stores, step=0, num_batches=2)
    return held_out_rows(program, params, stores, num_batches=2), result["objectives"]["labels"]


def test_rows_of_labels_add_up_and_are_those_of_other_architectures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("train", "held_out"):
        lines = [
            {"text": " ".join(rng.choice(list("abc"), WORDS)), "labels": " ".join(rng.choice(LABELS, WORDS))}
            for _ in range(24)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    encoder = labels_run(tmp_path, "encoder", 2 * WORDS)
    stores = prepare(encoder.data, report=lambda line: None)
    rows, scores = rows_of(encoder, stores)
    assert scores["tokens"] == sum(row["tokens"] for row in rows) == 16 * WORDS
    assert sum(row["loss"] for row in rows) / scores["tokens"] == pytest.approx(scores["loss"], rel=1e-4)
    assert sum(row["correct"] for row in rows) / scores["tokens"] == pytest.approx(scores["accuracy"], rel=1e-6)
    assert set(held_out_draws(rows)) == {"loss/labels", "accuracy/labels"}
    # A decoder reads a start token first. With one position more its row has the same words, and without it fewer.
    decoder, _ = rows_of(labels_run(tmp_path, "causal_lm", 2 * WORDS + 1), stores)
    assert [row["digest"] for row in decoder] == [row["digest"] for row in rows]
    cut, _ = rows_of(labels_run(tmp_path, "causal_lm", 2 * WORDS), stores)
    assert not {row["digest"] for row in cut} & {row["digest"] for row in rows}
    assert sum(row["tokens"] for row in cut) == 16 * (WORDS - 1)
