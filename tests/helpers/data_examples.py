"""Small token stores to read from, and rows taken apart again."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from t5x_like.config import DataConfig, MaskedLM, Objective, TokenizerConfig, ul2
from t5x_like.config.objectives import CausalLM, Layout
from t5x_like.data.objectives.examples import Examples
from t5x_like.data.objectives.registry import restore
from t5x_like.data.store.token_store import Store, StoreWriter
from t5x_like.data.stream.feature_converters import Features
from t5x_like.data.tokenizers.bytes import ByteTokenizer
from t5x_like.data.tokenizers.vocabulary import NUM_SPECIAL, Vocabulary


def numbered_store(
    path: Path,
    train: int,
    validation: int = 0,
    num_sentinels: int = 64,
    base: int | None = None,
    lengths: Sequence[int] = (),
) -> Store:
    """Write a store in which every token differs from all others: token i of a split is 3 + i.

    `base` is the size of the vocabulary's base, at least the number of tokens. `lengths` has the lengths of the
    training documents; without it there is one document.
    """
    vocabulary = Vocabulary(base_size=NUM_SPECIAL + (base or max(train, validation)), num_sentinels=num_sentinels)
    with StoreWriter(path, vocab_size=vocabulary.vocab_size) as writer:
        for split, count in (("train", train), ("validation", validation)):
            if count:
                tokens = np.arange(NUM_SPECIAL, NUM_SPECIAL + count)
                cuts = np.cumsum(lengths)[:-1] if lengths and split == "train" else []
                writer.append(split, np.split(tokens, cuts), count)
        info = {
            "tokenizer": dataclasses.asdict(TokenizerConfig(kind="bytes")),
            "vocabulary": dataclasses.asdict(vocabulary),
            "tokenizer_fingerprint": "numbers",
            "source_fingerprint": "numbers",
            "left_out": {},
        }
        writer.commit(info)
    return Store.open(path)


def pair_store(path: Path, lengths: Sequence[tuple[int, int]]) -> tuple[Store, list[tuple[list[int], list[int]]]]:
    """Write a store of pairs of these lengths; return it and the pairs."""
    numbers = itertools.count(NUM_SPECIAL)
    pairs = [tuple([next(numbers) for _ in range(size)] for size in sizes) for sizes in lengths]
    vocabulary = Vocabulary(base_size=next(numbers), num_sentinels=4)
    with StoreWriter(path, vocab_size=vocabulary.vocab_size, sequences_per_document=2) as writer:
        writer.append("train", [np.array(part, np.int64) for pair in pairs for part in pair], 1)
        info = {"vocabulary": dataclasses.asdict(vocabulary), "tokenizer_fingerprint": "numbers", "parts": 2}
        writer.commit(info)
    return Store.open(path), pairs


def text_store(path: Path, train: list[str], validation: list[str] | None = None, num_sentinels: int = 64) -> Store:
    """Write a store of texts as bytes."""
    tokenizer = ByteTokenizer(num_sentinels)
    with StoreWriter(path, vocab_size=tokenizer.vocab_size) as writer:
        for split, texts in (("train", train), ("validation", validation or [])):
            if texts:
                documents = [np.array([*tokenizer.encode(text), tokenizer.eos_id]) for text in texts]
                writer.append(split, documents, sum(len(text.encode()) for text in texts))
        info = {
            "tokenizer": dataclasses.asdict(TokenizerConfig(kind="bytes", num_sentinels=num_sentinels)),
            "vocabulary": dataclasses.asdict(tokenizer.vocabulary),
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "source_fingerprint": "",
            "left_out": {"empty": 2},
        }
        writer.commit(info)
    return Store.open(path)


def data_config(layout: Layout = "encoder_decoder", mixture: tuple[Objective, ...] | None = None) -> DataConfig:
    default: tuple[Objective, ...] = {"encoder": (MaskedLM(),), "causal_lm": (CausalLM(),)}.get(layout, ul2())
    return DataConfig(
        layout=layout,
        mixture=mixture or default,
        inputs_length=48,
        targets_length=0 if layout == "encoder" else 48,
        tokenizer=TokenizerConfig(kind="bytes", num_sentinels=64),
    )


def raw_tokens(row: Features, data: DataConfig, vocabulary: Vocabulary) -> np.ndarray:
    """Return the window that a row of features was made from, for a vocabulary that pads with 0 and no text has 0."""
    objective = data.mixture[int(row["denoiser_ids"][0])]
    if data.layout == "encoder":
        inputs, targets = row["encoder_input_tokens"][0], row["encoder_target_tokens"][0]
        return restore(without_zeros(inputs), without_zeros(targets), objective, vocabulary)
    targets = without_zeros(row["decoder_target_tokens"][0])
    if data.layout == "encoder_decoder":
        return restore(without_zeros(row["encoder_input_tokens"][0]), targets, objective, vocabulary)
    if objective.predicts_in_place:
        return targets[targets != 0]
    if not objective.has_inputs:
        return restore(targets[:0], targets, objective, vocabulary)
    # Inputs attend to one position beyond their own; only then can the first of the targets be without a score.
    given = np.zeros(len(targets), np.bool_)
    if data.layout == "prefix_lm":
        given[: max(int(row["decoder_causal_attention"][0].sum()) - 1, 0)] = True
    else:
        given = np.cumsum(row["decoder_loss_weights"][0][: len(targets)] > 0) == 0
    return restore(targets[given], targets[~given], objective, vocabulary)


def restored(examples: Examples, row: int, objective: Objective, vocabulary: Vocabulary) -> np.ndarray:
    """Return the window that an example was made from."""
    inputs = examples.inputs_NxI[row, : examples.input_lengths_N[row]]
    return restore(inputs, examples.targets_NxT[row, : examples.target_lengths_N[row]], objective, vocabulary)


def without_zeros(tokens: np.ndarray) -> np.ndarray:
    """Return the tokens before padding with 0."""
    return np.trim_zeros(tokens, "b")
