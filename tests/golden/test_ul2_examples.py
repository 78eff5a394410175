"""The examples of the seven UL2 denoisers on a window of numbers, which must not change unnoticed.

A change here changes the data of every run that is to be resumed: raise `stream.VERSION` with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
from helpers.data_examples import restored, without_zeros

from t5x_like.config import DataConfig, Objective, ul2
from t5x_like.data.objectives.registry import denoise, restore
from t5x_like.data.store.token_store import Store, StoreWriter
from t5x_like.data.stream import rng
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.data.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary(base_size=100, num_sentinels=20)
LENGTH = 40
OBJECTIVES = {objective.name: objective for objective in ul2()}
EXACT = {objective.name: objective for objective in ul2(t5_exact=True)}


def spell(ids: np.ndarray) -> str:
    """Return tokens as numbers from 0, runs of them as first-last, sentinels as s0, s1, ..., and EOS as $."""
    parts: list[str] = []
    run: list[int] = []
    for token in [*(int(t) for t in np.trim_zeros(ids, "b")), 0]:
        if run and token == run[-1] + 1 and token < VOCABULARY.base_size:
            run.append(token)
            continue
        if run:
            parts.append(str(run[0] - 3) if len(run) == 1 else f"{run[0] - 3}-{run[-1] - 3}")
            run = []
        if 3 <= token < VOCABULARY.base_size:
            run = [token]
        elif token:
            name = VOCABULARY.special_name(token) or ""
            parts.append({"</s>": "$"}.get(name, name.replace("<extra_id_", "s").replace(">", "")))
    return " ".join(parts)


def example(objective: Objective) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.arange(3, 3 + LENGTH)[None, :]
    examples = denoise(tokens, rng.fold_in(2022, list(OBJECTIVES).index(objective.name)), objective, VOCABULARY)
    assert np.array_equal(restored(examples, 0, objective, VOCABULARY), tokens[0])
    return examples.inputs_NxI[0], examples.targets_NxT[0]


GOLDEN: dict[str, tuple[str, str]] = {
    "R_3_0.15": ("[R] 0-2 s0 8-35 s1 37-39 $", "s0 3-7 s1 36 $"),
    "R_8_0.15": ("[R] 0-1 s0 8-39 $", "s0 2-7 $"),
    "X_3_0.5": (
        "[X] s0 1-5 s1 10-12 s2 14 s3 16 s4 19-24 s5 26 s6 28-30 s7 $",
        "s0 0 s1 6-9 s2 13 s3 15 s4 17-18 s5 25 s6 27 s7 31-39 $",
    ),
    "X_8_0.5": ("[X] 0-7 s0 15-21 s1 35-39 $", "s0 8-14 s1 22-34 $"),
    "X_64_0.15": ("[X] 0-33 s0 $", "s0 34-39 $"),
    "X_64_0.5": ("[X] s0 2-21 s1 $", "s0 0-1 s1 22-39 $"),
    "S": ("[S] 0-31 $", "32-39 $"),
}
GOLDEN_EXACT: dict[str, tuple[str, str]] = {
    "R_3_0.15": ("[R] 0-27 s0 29-34 s1 $", "s0 28 s1 35-39 $"),
    "R_8_0.15": ("[R] 0-33 s0 $", "s0 34-39 $"),
    "X_3_0.5": (
        "[X] 0-2 s0 4 s1 6 s2 9-14 s3 16 s4 18-20 s5 31-35 s6 $",
        "s0 3 s1 5 s2 7-8 s3 15 s4 17 s5 21-30 s6 36-39 $",
    ),
    "X_8_0.5": ("[X] 0-12 s0 20-26 s1 $", "s0 13-19 s1 27-39 $"),
    "X_64_0.15": ("[X] 0-33 s0 $", "s0 34-39 $"),
    "X_64_0.5": ("[X] 0-19 s0 $", "s0 20-39 $"),
}
ROWS: dict[str, object] = {
    "denoisers": [6, 3, 2, 1, 0, 6],
    "starts": [4840, 1255, 299, 3538, 4661, 2006],
    "inputs": "2a913e9eba753a83",
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_denoisers(name: str) -> None:
    inputs, targets = example(OBJECTIVES[name])
    assert (spell(inputs), spell(targets)) == GOLDEN[name]


def test_first_rows_of_the_stream(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store", vocab_size=6000) as writer:
        writer.append("train", [np.arange(3, 5000)], 4997)
        vocabulary = dataclasses.asdict(Vocabulary(base_size=5000, num_sentinels=40))
        writer.commit({"vocabulary": vocabulary, "tokenizer_fingerprint": ""})
    data = DataConfig(layout="encoder_decoder", mixture=ul2(), inputs_length=64, targets_length=64, seed=7)
    stream = TrainingStream([Store.open(tmp_path / "store")], data, 8)
    rows = stream.get_rows(np.array([0, 1, 2, 3, stream.rows_per_epoch["python_docs"], 10**9]))
    objectives = [data.mixture[number] for number in rows["denoiser_ids"]]
    assert rows["denoiser_ids"].tolist() == ROWS["denoisers"]
    pairs = zip(rows["encoder_input_tokens"], rows["decoder_target_tokens"], objectives, strict=True)
    vocabulary = stream.vocabulary
    windows = [restore(without_zeros(given), without_zeros(wanted), each, vocabulary) for given, wanted, each in pairs]
    assert [int(window[0]) - 3 for window in windows] == ROWS["starts"]
    digest = hashlib.sha256(rows["encoder_input_tokens"].astype("<i4").tobytes()).hexdigest()
    assert digest[:16] == ROWS["inputs"]


@pytest.mark.parametrize("name", [name for name in EXACT if name != "S"])
def test_denoisers_with_t5_exact_placement(name: str) -> None:
    inputs, targets = example(EXACT[name])
    assert (spell(inputs), spell(targets)) == GOLDEN_EXACT[name]
