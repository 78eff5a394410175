"""Held-out continuations: the same windows of raw tokens for models of every architecture, in the form of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from t5x_like.config.continuation import continuing_objective, has_bound
from t5x_like.config.data import DataConfig
from t5x_like.config.objectives import PrefixLM
from t5x_like.data.objectives.examples import Examples, Tokens, scored_part, without_inputs
from t5x_like.data.objectives.prefix_lm import split_at
from t5x_like.data.store.token_store import Split, Store
from t5x_like.data.stream.feature_converters import RowIds
from t5x_like.data.stream.heldout import (
    Batch,
    WindowBatches,
    cut_windows,
    held_out_features,
    masked_batches,
    padded_batch,
)
from t5x_like.errors import DataError


def continuation_batches(
    store: Store, data: DataConfig, batch_size: int, given: int, scored: int, windows: int, split: str = "validation"
) -> Iterator[WindowBatches]:
    """Yield batches of windows whose first `given` raw tokens are read and whose last `scored` ones are scored.

    The windows lie side by side in the split, from its first token on. Their order does not depend on the model: the
    first `windows` of a permutation of all of them. Each layout has the form of its training, with its mode token, EOS
    or start token; models that predict tokens in place (`has_bound`) are scored by the bound of masked diffusion.

    Args:
      windows: Largest number of windows.

    Raises:
      DataError: the split is shorter than a window.
    """
    length = given + scored
    text = _split_of_windows(store, length, split)
    first = 0
    for tokens_NxL, window_N in cut_windows(text, length, batch_size, -(-windows // batch_size)):
        tokens, window_N = tokens_NxL[: windows - first].astype(np.int32), window_N[: windows - first]
        batches: tuple[Batch, ...]
        if has_bound(data):
            batches = masked_batches(store, data, batch_size, tokens, window_N, scored=scored, first=first)
        else:
            batches = (_predicted_batch(store, data, batch_size, tokens, given),)
        first += len(window_N)
        yield WindowBatches.of(batches, store, tokens, window_N, given)


def require_windows(stores: Sequence[Store], continuation: tuple[int, int]) -> None:
    """Raise DataError if the held-out text of a store is shorter than a window of `evaluation.continuation`."""
    for store in stores:
        # Pairs and other examples of several texts have no continuation.
        if store.sequences_per_document == 1:
            _split_of_windows(store, sum(continuation), "validation")


def _split_of_windows(store: Store, length: int, name: str) -> Split:
    split = store.split(name)
    if split.num_tokens < length:
        raise DataError(
            f"{store.path}: found {split.num_tokens:,} tokens in the split {name!r}, expected at least {length}: one "
            "window of evaluation.continuation. Lower it, or raise data.corpus.validation_fraction."
        )
    return split


def _predicted_batch(store: Store, data: DataConfig, batch_size: int, tokens_NxL: Tokens, given: int) -> Batch:
    """Return a batch in which each scored token is predicted from the tokens before it."""
    objective, index = continuing_objective(data)
    rows, length = tokens_NxL.shape
    if isinstance(objective, PrefixLM):
        split = split_at(tokens_NxL, np.full(rows, given, np.int64), objective, store.vocabulary)
        # No EOS after the targets: it is not scored, and a row may end with the last scored token.
        targets_N = np.full(rows, length - given, np.int64)
        examples = Examples(split.inputs_NxI, tokens_NxL[:, given:], split.input_lengths_N, targets_N)
    else:
        examples = scored_part(without_inputs(tokens_NxL, np.full(rows, length, np.int64)), given, length - given)
    return padded_batch(held_out_features(examples, data, RowIds.of(store.vocabulary)), batch_size, index)
