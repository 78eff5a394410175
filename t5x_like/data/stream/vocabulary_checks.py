"""Checks that stores share one vocabulary, and that it has the ids that the objectives need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from t5x_like.config.data import DataConfig
from t5x_like.data.store.token_store import Store
from t5x_like.data.tokenizers.vocabulary import Vocabulary
from t5x_like.errors import ConfigError, ConfigProblem, DataError


def common_vocabulary(stores: Sequence[Store]) -> Any:
    """Return the vocabulary of all stores.

    Raises:
      DataError: the stores have different tokenizers, so that an id would stand for different texts.
    """
    first = stores[0]
    for store in stores[1:]:
        fingerprint, expected = store.info["tokenizer_fingerprint"], first.info["tokenizer_fingerprint"]
        if (fingerprint, store.vocabulary) != (expected, first.vocabulary):
            raise DataError(
                f"{store.path}: found a store made by the tokenizer {fingerprint} with {store.vocabulary.vocab_size:,} "
                f"ids, expected {expected} with {first.vocabulary.vocab_size:,} as in {first.path}; prepare both with "
                "one tokenizer"
            )
    return first.vocabulary


def check_objectives(data: DataConfig, vocabulary: Vocabulary) -> None:
    """Raise ConfigError if a window of text is empty, or if its spans can outnumber the sentinels of the vocabulary.

    Pairs and dialogues have no windows: the targets of a pair may be one token with EOS.
    """
    problems = []
    # An objective that needs one sentinel needs a mask token, which the tokenizer may have.
    marks = max(vocabulary.num_sentinels, 0 if vocabulary.own_mask_id is None else 1)
    for objective in data.objectives:
        window = objective.raw_window_length(data.layout, data.inputs_length, data.targets_length)
        needed = objective.sentinels_needed(window)
        where = f"data.mixture ({objective.name})"
        if window < 1 and objective.example_source in ("text", "labelled"):
            problems.append(
                ConfigProblem(where, "rows too short for two tokens", "longer inputs_length and targets_length")
            )
        if needed > marks:
            problems.append(ConfigProblem(where, f"up to {needed} spans", f"at most {marks}, one per sentinel"))
    if problems:
        raise ConfigError(problems)
