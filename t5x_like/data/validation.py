"""Held-out batches: the same rows for every step, seed and host count, so that scores can be compared.

Windows do not overlap; their order and their noise come from fixed keys, not from `data.seed`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like.config.batch import MAIN, RowShape, sub_batch_spec
from t5x_like.config.data import CorpusShare, DataConfig
from t5x_like.config.lengths import prefix_target_range, raw_window_length
from t5x_like.config.objectives import WITHOUT_INPUTS, CausalLM, Labelled, Objective, PrefixLM
from t5x_like.data import keys as rng
from t5x_like.data.denoise import Examples, denoise, split_at
from t5x_like.data.features import Features, convert, put_rows
from t5x_like.data.labelled import LabelledRows
from t5x_like.data.packing import Packed
from t5x_like.data.store import Split, Store

Batch = dict[str, Features]

_ORDER, _NOISE = 0x0DE5, 0xE7A1


@dataclasses.dataclass(frozen=True)
class ScoredBatch:
    """A batch and the text that its loss weights cover.

    Attributes:
      batch: The features, as in training; only real tokens of the continuations have weight 1.
      tokens: The scored tokens of all rows, one after the other.
      text: Their exact bytes. An EOS between two documents is scored and stands for no byte.
    """

    batch: Batch
    tokens: npt.NDArray[np.int32]
    text: bytes


def objective_batches(
    store: Store,
    data: DataConfig,
    share: CorpusShare,
    batch_size: int,
    objective: Objective,
    num_batches: int,
    split: str = "validation",
) -> Iterator[Batch]:
    """Batches of held-out examples of one corpus, one per row, all under one objective.

    Args:
      share: The corpus of the store: its examples are windows or documents.
      objective: Of this corpus.
      num_batches: At most; fewer where the split has no more examples. The last batch is filled up with rows of
        padding, whose loss weights are 0.
    """
    number = data.objectives.index(objective)
    if isinstance(objective, Labelled):
        yield from _labelled_batches(store, data, batch_size, objective, num_batches, split)
        return
    if data.examples_of(share) == "documents":
        yield from _document_batches(store, data, batch_size, number, num_batches, split)
        return
    alone = dataclasses.replace(objective, paired=False) if isinstance(objective, PrefixLM) else objective
    length = raw_window_length(objective, data.layout, data.inputs_length, data.targets_length)
    traits = store.traits_for((objective,))
    for tokens_NxL, window_N in _windows(store.split(split), length, batch_size, num_batches):
        examples = denoise(tokens_NxL, rng.fold_in(_NOISE, window_N), alone, store.vocabulary, traits)
        yield _batch(convert(examples, data.layout, data.inputs_length, data.targets_length), batch_size, number)


def _document_batches(
    store: Store, data: DataConfig, batch_size: int, objective: int, num_batches: int, split: str
) -> Iterator[Batch]:
    """One document or pair per row."""
    if not store.split(split).num_documents:
        return
    packed = Packed(store.split(split), store.parts, data, (data.objectives[objective],), rng.fold_in(_ORDER, 0))
    shape = RowShape(data.inputs_length, data.targets_length, packed=False)
    traits = store.traits_for((data.objectives[objective],))
    for first in range(0, min(packed.num_pieces, batch_size * num_batches), batch_size):
        piece = packed.pick(np.arange(first, min(first + batch_size, packed.num_pieces)))
        keys_N = rng.fold_in(_NOISE, np.arange(first, first + len(piece.row_N)))
        spec = sub_batch_spec(data, shape, batch_size)
        out = {name: np.zeros(array.shape, np.int32) for name, array in spec.items()}
        for row_n, examples in packed.examples(piece, keys_N, 0, store.vocabulary, traits):
            put_rows(out, row_n, examples, data.layout, shape, objective)
        yield {MAIN: {**out, "denoiser_ids": np.full(batch_size, objective, np.int32)}}


def _labelled_batches(
    store: Store, data: DataConfig, batch_size: int, objective: Labelled, num_batches: int, split: str
) -> Iterator[Batch]:
    if not store.split(split).num_documents:
        return
    examples = LabelledRows(store, store.split(split), data, objective, rng.fold_in(_ORDER, 0))
    spec = sub_batch_spec(data, RowShape(data.inputs_length, 0, packed=False), batch_size)
    for first in range(0, min(examples.num_rows, batch_size * num_batches), batch_size):
        row_n = np.arange(min(batch_size, examples.num_rows - first))
        out: Features = {name: np.zeros(array.shape, array.dtype) for name, array in spec.items()}
        examples.put(out, row_n, examples.visited(first + row_n))
        yield {MAIN: out}


def prefix_lm_batches(
    store: Store, data: DataConfig, batch_size: int, num_batches: int, split: str = "validation"
) -> Iterator[ScoredBatch]:
    """Batches of held-out windows of which the first half is given and the second half is scored.

    Windows and rows are those of training: the mixture's prefix LM has its own window length and mode token, and is cut
    in the middle, or as near to it as its law allows, since a model that never made so long targets would expect EOS.
    A mixture without one has its causal LM, which is given the first half as text to go on with; one of span corruption
    only, a prefix LM without mode token. The EOS that closes the targets is no text and has weight 0. An encoder and a
    corpus of pairs have no such batches.
    """
    if data.layout == "encoder":
        return
    if store.parts > 1:
        return
    objective, index = _continuation(data)
    length = raw_window_length(objective, data.layout, data.inputs_length, data.targets_length)
    for tokens_NxL, _ in _windows(store.split(split), length, batch_size, num_batches):
        given = _given(objective, tokens_NxL.shape[1])
        examples = _rest_scored(tokens_NxL, given, objective, store)
        features = convert(examples, data.layout, data.inputs_length, data.targets_length)
        scored = tokens_NxL[:, given:].astype(np.int32).ravel()
        yield ScoredBatch(_batch(features, batch_size, index), scored, store.tokenizer.to_bytes(scored.tolist()))


def _continuation(data: DataConfig) -> tuple[PrefixLM | CausalLM, int]:
    """The objective whose form the rows get, and its index in the mixture."""
    for kind in (PrefixLM, CausalLM):
        for index, objective in enumerate(data.objectives):
            if isinstance(objective, kind):
                return objective, index
    for index, objective in enumerate(data.objectives):
        if isinstance(objective, WITHOUT_INPUTS):
            return CausalLM(), index
    return PrefixLM(name="prefix_lm", min_target_fraction=0.5, max_target_fraction=0.5), 0


def _given(objective: PrefixLM | CausalLM, length: int) -> int:
    """Tokens of a window that are given."""
    if isinstance(objective, CausalLM):
        return length // 2
    fewest, most = prefix_target_range(objective, length)
    return length - min(max(length // 2, fewest), most)


def _rest_scored(tokens_NxL: npt.NDArray[Any], given: int, objective: PrefixLM | CausalLM, store: Store) -> Examples:
    rows, length = tokens_NxL.shape
    no_keys_N = np.zeros(rows, np.uint64)
    if isinstance(objective, PrefixLM):
        given_N = np.full(rows, given, np.int64)
        examples = split_at(tokens_NxL.astype(np.int32), given_N, objective, store.vocabulary)
        first = 0
    else:
        examples = denoise(tokens_NxL, no_keys_N, objective, store.vocabulary)
        first = given
    scored_NxT = np.zeros(examples.targets_NxT.shape, np.bool_)
    scored_NxT[:, first : first + length - given] = True
    return dataclasses.replace(examples, scored_NxT=scored_NxT)


def _windows(
    split: Split, length: int, batch_size: int, num_batches: int
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.int64]]]:
    """(tokens [N, length], window numbers [N]), N at most `batch_size`. A split shorter than one window is one window,
    of an even number of tokens; one of fewer than two tokens has none."""
    length = min(length, split.num_tokens // 2 * 2)
    if length < 2:
        return
    windows = split.num_tokens // length
    shown = min(windows, batch_size * num_batches)
    for first in range(0, shown, batch_size):
        places = np.arange(first, min(first + batch_size, shown), dtype=np.int64)
        window_N = rng.permute(places, windows, rng.fold_in(_ORDER, 0))
        yield split.gather(window_N * length, length), window_N


def _batch(features: Features, batch_size: int, objective: int) -> Batch:
    rows = len(next(iter(features.values())))
    filled = {
        name: np.concatenate([values, np.zeros((batch_size - rows, values.shape[1]), np.int32)])
        for name, values in features.items()
    }
    return {MAIN: {**filled, "denoiser_ids": np.full(batch_size, objective, np.int32)}}
