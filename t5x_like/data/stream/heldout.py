"""Held-out batches: the same rows for every step, seed and number of hosts, so that scores are comparable.

Windows do not overlap. Their order and their noise come from fixed keys, not from `data.seed`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like.config.batch_spec import MAIN, RowShape, loss_weight_type, sub_batch_spec
from t5x_like.config.continuation import block_objective, continuing_objective, has_bound
from t5x_like.config.data import CorpusShareConfig, DataConfig
from t5x_like.config.objectives import BlockDiffusion, MaskedDiffusion, Objective
from t5x_like.data.objectives.block_diffusion import mask_blocks
from t5x_like.data.objectives.examples import Examples, Tokens
from t5x_like.data.objectives.masked_diffusion import mask_positions, masked_counts, random_masks
from t5x_like.data.objectives.registry import denoise, implementation
from t5x_like.data.store.token_store import Split, Store
from t5x_like.data.stream import rng
from t5x_like.data.stream.feature_converters import Features, RowIds, convert, put_rows, with_document_borders
from t5x_like.data.stream.labeled_rows import LabeledRows
from t5x_like.data.stream.packing import PackedRows
from t5x_like.data.stream.preference_rows import PreferenceRows
from t5x_like.data.tokenizers.vocabulary import Vocabulary
from t5x_like.errors import DataError

Batch = dict[str, Features]

# Constants in place of `data.seed`: runs of different seeds are scored on the same windows with the same noise.
_ORDER, _NOISE, _STRATUM = 0x0DE5, 0xE7A1, 0x57A7


BOUND_GRID = 4
"""Numbers of masked tokens at which each window, or each block of it, is scored for the bound of masked diffusion."""


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


@dataclasses.dataclass(frozen=True)
class WindowBatches:
    """Batches that together score the ends of N windows.

    Attributes:
      batches: Batches with the same window in the same row. The loss of a row, summed over the batches, is the negative
        log-likelihood of the scored tokens, given the tokens before them (one batch), or estimates its bound by masked
        diffusion (`BOUND_GRID` batches) or by block diffusion (as many for each block).
      window_N: Number of each window in the split: its first token is at this multiple of the length of a window.
      tokens_NxT: The scored tokens.
      texts: Exact bytes of each of them. An EOS between two documents is scored and has no bytes.
      digests: Digest of each window: of its given and its scored tokens.
    """

    batches: tuple[Batch, ...]
    window_N: npt.NDArray[np.int64]
    tokens_NxT: Tokens
    texts: tuple[bytes, ...]
    digests: tuple[str, ...]

    @staticmethod
    def of(
        batches: tuple[Batch, ...], store: Store, tokens_NxL: Tokens, window_N: npt.NDArray[np.int64], given: int
    ) -> WindowBatches:
        """Return the batches of windows whose first `given` tokens are given and whose others are scored."""
        scored_NxT = tokens_NxL[:, given:]
        texts = tuple(store.tokenizer.to_bytes(row) for row in scored_NxT.tolist())
        return WindowBatches(batches, window_N, scored_NxT, texts, tuple(_digest(row, given) for row in tokens_NxL))


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
    if data.labelled is not None or data.preference is not None:
        yield from _pair_batches(store, data, batch_size, num_batches, split)
        return
    # Held-out rows have one example each, also where training packs several.
    if data.examples_of(share) == "documents":
        yield from _document_batches(store, data, batch_size, number, num_batches, split)
        return
    # One window per row: an objective may put several into a row in training.
    single = objective.single_window()
    length = objective.raw_window_length(data.layout, data.inputs_length, data.targets_length)
    traits = store.traits_for((objective,))
    first = 0
    for tokens_NxL, window_N in cut_windows(store.split(split), length, batch_size, num_batches):
        # By the rank of the window, so that the scored windows together are stratified.
        words_N = rng.stratified(rng.fold_in(_STRATUM, 0), np.arange(first, first + len(window_N)))
        first += len(window_N)
        examples = denoise(tokens_NxL, rng.fold_in(_NOISE, window_N), single, store.vocabulary, traits, words_N)
        yield padded_batch(held_out_features(examples, data, RowIds.of(store.vocabulary)), batch_size, number)


def _document_batches(
    store: Store, data: DataConfig, batch_size: int, objective: int, num_batches: int, split: str
) -> Iterator[Batch]:
    """Yield batches with one document or pair per row."""
    if not store.split(split).num_documents:
        return
    objectives = (data.objectives[objective],)
    key = rng.fold_in(_ORDER, 0)
    needed = batch_size * num_batches
    reader = PackedRows(store.split(split), store.sequences_per_document, data, objectives, key, num_held_out=needed)
    shape = RowShape(data.inputs_length, data.targets_length, packed=False)
    traits = store.traits_for(objectives)
    for first in range(0, min(reader.totals.examples, needed), batch_size):
        packed = reader.take(np.arange(first, min(first + batch_size, reader.totals.examples)))
        # By example index, so that the noise of an example does not depend on the batch size.
        keys_N = rng.fold_in(_NOISE, np.arange(first, first + len(packed)))
        spec = sub_batch_spec(data, shape, batch_size)
        out: Features = {name: np.zeros(array.shape, array.dtype) for name, array in spec.items()}
        for row_n, examples in reader.examples(packed, keys_N, 0, store.vocabulary, traits):
            put_rows(out, row_n, examples, data.layout, shape, objective, RowIds.of(store.vocabulary))
        yield {MAIN: {**out, "denoiser_ids": np.full(batch_size, objective, np.int32)}}


def _pair_batches(store: Store, data: DataConfig, batch_size: int, num_batches: int, split: str) -> Iterator[Batch]:
    """Yield batches with one labelled example, or one preference pair, per row."""
    if not store.split(split).num_documents:
        return
    key = rng.fold_in(_ORDER, 0)
    reader: LabeledRows | PreferenceRows
    if data.preference is not None:
        if store.split(split).reference_log_probs is None:
            raise DataError(
                f"{store.path}: found preference pairs without the log-probabilities of the reference, expected those "
                "that `train` has written to the run directory; `eval --pairs` scores pairs of texts by any model"
            )
        reader = PreferenceRows(store, store.split(split), data, data.preference, key)
    else:
        assert data.labelled is not None
        reader = LabeledRows(store, store.split(split), data, data.labelled, key)
    spec = sub_batch_spec(data, RowShape(data.inputs_length, data.targets_length, packed=False), batch_size)
    for first in range(0, min(reader.num_rows, batch_size * num_batches), batch_size):
        row_n = np.arange(min(batch_size, reader.num_rows - first))
        out: Features = {name: np.zeros(array.shape, array.dtype) for name, array in spec.items()}
        reader.put(out, row_n, reader.shuffled_rows(first + row_n))
        yield {MAIN: out}


def prefix_lm_batches(
    store: Store, data: DataConfig, batch_size: int, num_batches: int, split: str = "validation"
) -> Iterator[ScoredBatch]:
    """Yield batches of held-out windows whose first half is given and whose second half is scored.

    Windows and rows are as long as in training. The mixture's prefix LM is used with its window length and mode token.
    It is cut in the middle, or as close to the middle as its distribution of cuts allows, because a model that never
    produced targets of this length would expect EOS. A mixture without prefix LM uses its causal LM, which continues
    the first half. A mixture of span corruption only uses a prefix LM without mode token. The EOS at the end of the
    targets is not text and has weight 0. A model whose objectives all predict tokens in place (`has_bound`) and a
    corpus of pairs have no such batches.
    """
    if data.layout == "encoder" or has_bound(data):
        return
    if store.sequences_per_document > 1:
        return
    objective, index = _continuation(data)
    length = objective.raw_window_length(data.layout, data.inputs_length, data.targets_length)
    for tokens_NxL, _ in cut_windows(store.split(split), length, batch_size, num_batches):
        examples, num_given = implementation(objective).continuation(tokens_NxL, store.vocabulary)
        features = held_out_features(examples, data, RowIds.of(store.vocabulary))
        scored = tokens_NxL[:, num_given:].astype(np.int32).ravel()
        yield ScoredBatch(padded_batch(features, batch_size, index), scored, store.tokenizer.to_bytes(scored.tolist()))


def bound_batches(
    store: Store, data: DataConfig, batch_size: int, num_batches: int, split: str = "validation"
) -> Iterator[WindowBatches]:
    """Yield batches of held-out windows whose first half is given and whose second half is scored by the bound.

    Windows and rows are as long as in training. Of the n tokens of the second half, k are masked and scored with the
    weight n / k, for `BOUND_GRID` values of k: one in each of as many equal parts of 1..n. The values are shifted from
    window to window, evenly within the parts, so that all k occur alike and the mean over windows is that over 1..n.
    Windows, values of k and masks are the same for every model of this row length. With block diffusion, this is done
    for each block of the second half, given all text before it without masks; see `masked_batches`.

    Yields nothing unless `has_bound`, and for a corpus of pairs.
    """
    if not has_bound(data) or store.sequences_per_document > 1:
        return
    objective = block_objective(data) or MaskedDiffusion()
    length = objective.raw_window_length(data.layout, data.inputs_length, data.targets_length)
    first = 0
    for tokens_NxL, window_N in cut_windows(store.split(split), length, batch_size, num_batches):
        scored = tokens_NxL.shape[1] - tokens_NxL.shape[1] // 2
        batches = masked_batches(store, data, batch_size, tokens_NxL, window_N, scored=scored, first=first)
        first += len(window_N)
        yield WindowBatches.of(batches, store, tokens_NxL.astype(np.int32), window_N, tokens_NxL.shape[1] - scored)


def masked_batches(
    store: Store,
    data: DataConfig,
    batch_size: int,
    tokens_NxL: Tokens,
    window_N: npt.NDArray[np.int64],
    *,
    scored: int,
    first: int,
) -> tuple[Batch, ...]:
    """Return `BOUND_GRID` batches of windows, whose last `scored` tokens are scored; see `bound_batches`.

    With block diffusion, they are cut into blocks from the first one on, and each block has as many batches.

    Args:
      window_N: Indices of the windows, which decide their masks.
      scored: Number of tokens at the end of each window that can be masked.
      first: Number of windows in the batches before these, over which the numbers of masked tokens are stratified.
    """
    ids, tokens = RowIds.of(store.vocabulary), tokens_NxL.astype(np.int32)
    ranks_N = np.arange(first, first + len(tokens))
    batches = []
    for examples in _masked_examples(tokens, window_N, ranks_N, scored, block_objective(data), store.vocabulary):
        # The weights stay fractions, whatever their type in training.
        features = convert(examples, data.layout, data.inputs_length, data.targets_length, ids)
        if data.mask_document_borders:
            features = with_document_borders(features, examples, data.layout, ids)
        batches.append(padded_batch(features, batch_size, 0))
    return tuple(batches)


def _masked_examples(
    tokens_NxL: Tokens,
    window_N: npt.NDArray[np.int64],
    ranks_N: npt.NDArray[np.int64],
    scored: int,
    objective: BlockDiffusion | None,
    vocabulary: Vocabulary,
) -> Iterator[Examples]:
    """Yield the examples of each batch of `masked_batches`."""
    rows, width = tokens_NxL.shape
    block = scored if objective is None else objective.block_length
    for number, start in enumerate(range(width - scored, width, block)):
        size = min(block, width - start)
        words_N = rng.stratified(rng.fold_in(_STRATUM, 1 + number), ranks_N)
        for part in range(BOUND_GRID):
            # (part + fraction) / BOUND_GRID of the range, in integers: the quotient of 64-bit words is exact.
            count_N = masked_counts(words_N // np.uint64(BOUND_GRID) + np.uint64(part * (2**64 // BOUND_GRID)), size)
            keys_N = rng.fold_in(rng.fold_in(_NOISE, window_N), number * BOUND_GRID + part)
            masked_NxB, total_N = random_masks(keys_N, count_N, size), np.full(rows, size / BOUND_GRID)
            if objective is not None:
                yield mask_blocks(tokens_NxL[:, : start + size], np.full(rows, start), masked_NxB, vocabulary, total_N)
                continue
            masked_NxL = np.zeros((rows, width), np.bool_)
            masked_NxL[:, start:] = masked_NxB
            yield mask_positions(tokens_NxL, masked_NxL, vocabulary, total_N)


def _continuation(data: DataConfig) -> tuple[Objective, int]:
    """Return the objective that decides the format of the rows, and its index in the mixture."""
    candidates = [(one, index) for index, one in enumerate(data.objectives) if implementation(one).continues_text]
    if candidates:
        # The first format with the lowest rank: a prefix LM before a causal LM.
        return min(candidates, key=lambda candidate: implementation(candidate[0]).prompt_preference)
    return continuing_objective(data)


def cut_windows(
    split: Split, length: int, batch_size: int, num_batches: int
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.int64]]]:
    """Yield (tokens [N, length], window indices [N]), with N at most `batch_size`.

    A split that is shorter than a window is one window with an even number of tokens. A split of fewer than two tokens
    has no window.
    """
    if split.num_tokens < length:
        # An even length, so that a continuation has as many given as scored tokens.
        length = split.num_tokens // 2 * 2
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


def held_out_features(examples: Examples, data: DataConfig, ids: RowIds) -> Features:
    """Return the features of examples, one per row, with the types of training."""
    features = convert(examples, data.layout, data.inputs_length, data.targets_length, ids)
    # All batches have the types of training, so that the evaluation step is compiled once.
    weights = f"{data.target_stack}_loss_weights"
    features[weights] = features[weights].astype(loss_weight_type(data), copy=False)
    return with_document_borders(features, examples, data.layout, ids) if data.mask_document_borders else features


def _digest(tokens_L: Tokens, given: int) -> str:
    return hashlib.sha256(f"{given} ".encode() + tokens_L.astype("<i4").tobytes()).hexdigest()[:16]


def padded_batch(features: Features, batch_size: int, objective: int) -> Batch:
    """Complete the batch with rows of padding."""
    rows = len(next(iter(features.values())))
    padded = {
        name: np.concatenate([values, np.zeros((batch_size - rows, values.shape[1]), values.dtype)])
        for name, values in features.items()
    }
    # By position if the rows have segments, as in training.
    segments = [values for name, values in padded.items() if name.endswith("_segment_ids")]
    shape = segments[0].shape if segments else (batch_size,)
    return {MAIN: {**padded, "denoiser_ids": np.full(shape, objective, np.int32)}}
