"""Held-out batches: the same rows for every step, seed and number of hosts, so that scores are comparable.

Windows do not overlap. Their order and their noise come from fixed keys, not from `data.seed`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like.config.batch_spec import MAIN, RowShape, sub_batch_spec
from t5x_like.config.data import CorpusShareConfig, DataConfig
from t5x_like.config.objectives import CausalLM, LabeledExamples, Objective, PrefixLM
from t5x_like.data.objectives.examples import Examples
from t5x_like.data.objectives.registry import denoise, implementation
from t5x_like.data.store.token_store import Split, Store
from t5x_like.data.stream import rng
from t5x_like.data.stream.feature_converters import Features, RowIds, convert, put_rows, with_document_borders
from t5x_like.data.stream.labeled_rows import LabeledRows
from t5x_like.data.stream.packing import PackedRows

Batch = dict[str, Features]

# Constants in place of `data.seed`: runs of different seeds are scored on the same windows with the same noise.
_ORDER, _NOISE = 0x0DE5, 0xE7A1


@dataclasses.dataclass(frozen=True)
class ScoredBatch:
    """Batch and the text that its loss weights cover.

    Attributes:
      batch: Features as in training. Only tokens of the continuations that are text have weight 1.
      tokens: Scored tokens of all rows, concatenated.
      text: Exact bytes of these tokens. An EOS between two documents is scored and has no bytes.
    """

    batch: Batch
    tokens: npt.NDArray[np.int32]
    text: bytes


def objective_batches(
    store: Store,
    data: DataConfig,
    share: CorpusShareConfig,
    batch_size: int,
    objective: Objective,
    num_batches: int,
    split: str = "validation",
) -> Iterator[Batch]:
    """Yield batches of held-out examples of one corpus, one example per row, all under one objective.

    Args:
      store: Store of the corpus.
      data: Data configuration of the run.
      share: Configuration of the corpus, which decides whether its examples are windows or documents.
      batch_size: Rows of a batch.
      objective: Objective of this corpus.
      num_batches: Maximum number of batches; a small split has fewer. The last batch is completed with rows of padding,
        whose loss weights are 0.
      split: Split to read.
    """
    number = data.objectives.index(objective)
    if data.labelled is not None:
        yield from _labeled_batches(store, data, batch_size, data.labelled, num_batches, split)
        return
    # Held-out rows have one example each, also where training packs several.
    if data.examples_of(share) == "documents":
        yield from _document_batches(store, data, batch_size, number, num_batches, split)
        return
    # One window per row: an objective may put several into a row in training.
    single = objective.single_window()
    length = objective.raw_window_length(data.layout, data.inputs_length, data.targets_length)
    traits = store.traits_for((objective,))
    for tokens_NxL, window_N in _windows(store.split(split), length, batch_size, num_batches):
        examples = denoise(tokens_NxL, rng.fold_in(_NOISE, window_N), single, store.vocabulary, traits)
        yield _batch(_features(examples, data, RowIds.of(store.vocabulary)), batch_size, number)


def _document_batches(
    store: Store, data: DataConfig, batch_size: int, objective: int, num_batches: int, split: str
) -> Iterator[Batch]:
    """Yield batches with one document or pair per row."""
    if not store.split(split).num_documents:
        return
    objectives = (data.objectives[objective],)
    key = rng.fold_in(_ORDER, 0)
    reader = PackedRows(store.split(split), store.sequences_per_document, data, objectives, key)
    shape = RowShape(data.inputs_length, data.targets_length, packed=False)
    traits = store.traits_for(objectives)
    for first in range(0, min(reader.num_examples, batch_size * num_batches), batch_size):
        packed = reader.take(np.arange(first, min(first + batch_size, reader.num_examples)))
        # By example index, so that the noise of an example does not depend on the batch size.
        keys_N = rng.fold_in(_NOISE, np.arange(first, first + len(packed.row_N)))
        spec = sub_batch_spec(data, shape, batch_size)
        out = {name: np.zeros(array.shape, np.int32) for name, array in spec.items()}
        for row_n, examples in reader.examples(packed, keys_N, 0, store.vocabulary, traits):
            put_rows(out, row_n, examples, data.layout, shape, objective, RowIds.of(store.vocabulary))
        yield {MAIN: {**out, "denoiser_ids": np.full(batch_size, objective, np.int32)}}


def _labeled_batches(
    store: Store, data: DataConfig, batch_size: int, objective: LabeledExamples, num_batches: int, split: str
) -> Iterator[Batch]:
    if not store.split(split).num_documents:
        return
    reader = LabeledRows(store, store.split(split), data, objective, rng.fold_in(_ORDER, 0))
    spec = sub_batch_spec(data, RowShape(data.inputs_length, 0, packed=False), batch_size)
    for first in range(0, min(reader.num_rows, batch_size * num_batches), batch_size):
        row_n = np.arange(min(batch_size, reader.num_rows - first))
        out: Features = {name: np.zeros(array.shape, array.dtype) for name, array in spec.items()}
        reader.put(out, row_n, reader.shuffled_rows(first + row_n))
        yield {MAIN: out}


def prefix_lm_batches(
    store: Store, data: DataConfig, batch_size: int, num_batches: int, split: str = "validation"
) -> Iterator[ScoredBatch]:
    """Yield batches of held-out windows whose first half is given and whose second half is scored.

    Windows and rows are those of training. The mixture's prefix LM is used with its window length and mode token. It is
    cut in the middle, or as close to the middle as its distribution of cuts allows, because a model that never produced
    targets of this length would expect EOS. A mixture without prefix LM uses its causal LM, which continues the first
    half. A mixture of span corruption only uses a prefix LM without mode token. The EOS at the end of the targets is
    not text and has weight 0. An encoder and a corpus of pairs have no such batches.
    """
    if data.layout == "encoder":
        return
    if store.sequences_per_document > 1:
        return
    objective, index = _continuation(data)
    length = objective.raw_window_length(data.layout, data.inputs_length, data.targets_length)
    for tokens_NxL, _ in _windows(store.split(split), length, batch_size, num_batches):
        examples, num_given = implementation(objective).continuation(tokens_NxL, store.vocabulary)
        features = _features(examples, data, RowIds.of(store.vocabulary))
        scored = tokens_NxL[:, num_given:].astype(np.int32).ravel()
        yield ScoredBatch(_batch(features, batch_size, index), scored, store.tokenizer.to_bytes(scored.tolist()))


def _continuation(data: DataConfig) -> tuple[Objective, int]:
    """Return the objective that decides the format of the rows, and its index in the mixture."""
    candidates = [(one, index) for index, one in enumerate(data.objectives) if implementation(one).continues_text]
    if candidates:
        # The first format with the lowest rank: a prefix LM before a causal LM.
        return min(candidates, key=lambda candidate: implementation(candidate[0]).prompt_preference)
    for index, objective in enumerate(data.objectives):
        if not objective.has_inputs:
            return CausalLM(), index
    return PrefixLM(name="prefix_lm", min_target_fraction=0.5, max_target_fraction=0.5), 0


def _windows(
    split: Split, length: int, batch_size: int, num_batches: int
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.int64]]]:
    """Yield (tokens [N, length], window indices [N]), with N at most `batch_size`.

    A split that is shorter than a window is one window with an even number of tokens. A split of fewer than two tokens
    has no window.
    """
    # An even length, so that a continuation has as many given as scored tokens.
    length = min(length, split.num_tokens // 2 * 2)
    if length < 2:
        return
    windows = split.num_tokens // length
    num_read = min(windows, batch_size * num_batches)
    for first in range(0, num_read, batch_size):
        # The first ranks of a permutation of all windows: a small `num_batches` still samples the whole split.
        rank_N = np.arange(first, min(first + batch_size, num_read), dtype=np.int64)
        window_N = rng.permute(rank_N, windows, rng.fold_in(_ORDER, 0))
        # Windows lie side by side, so a window's start is its index times its length.
        yield split.gather(window_N * length, length), window_N


def _features(examples: Examples, data: DataConfig, ids: RowIds) -> Features:
    features = convert(examples, data.layout, data.inputs_length, data.targets_length, ids)
    return with_document_borders(features, examples, data.layout, ids) if data.mask_document_borders else features


def _batch(features: Features, batch_size: int, objective: int) -> Batch:
    """Complete the batch with rows of padding."""
    rows = len(next(iter(features.values())))
    padded = {
        name: np.concatenate([values, np.zeros((batch_size - rows, values.shape[1]), np.int32)])
        for name, values in features.items()
    }
    # By position if the rows have segments, as in training.
    segments = [values for name, values in padded.items() if name.endswith("_segment_ids")]
    shape = segments[0].shape if segments else (batch_size,)
    return {MAIN: {**padded, "denoiser_ids": np.full(shape, objective, np.int32)}}
