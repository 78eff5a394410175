"""Operations that the infilling objectives share: spans move to the end of the stream, and no token is lost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from t5x_like.data.objectives.examples import Tokens
from t5x_like.data.tokenizers.vocabulary import Vocabulary
from t5x_like.utils.type_aliases import IntArray


def append_ids(tokens_NxL: Tokens, ids: Sequence[int]) -> Tokens:
    """Return the rows, each followed by the same ids."""
    extras = np.broadcast_to(np.array(ids, np.int32), (len(tokens_NxL), len(ids)))
    return np.concatenate([tokens_NxL, extras], axis=1)


def sentinel_ids(count: int, vocabulary: Vocabulary) -> range:
    """Return the ids of the first `count` sentinels; raises IndexError if the vocabulary has fewer."""
    vocabulary.sentinel_id(count - 1)
    return range(vocabulary.first_sentinel_id, vocabulary.first_sentinel_id - count, -1)


def text_with_sentinels(
    starts_NxM: IntArray, ends_NxM: IntArray, length: int, sentinel_NxM: IntArray, present_NxM: IntArray
) -> tuple[IntArray, IntArray]:
    """Return the pieces of the text with a sentinel in place of each span: starts and lengths, both [N, 2 M + 1].

    The pieces have the form that `concatenate` takes: text, sentinel, text, ..., sentinel, text.

    Args:
      starts_NxM, ends_NxM: Bounds of the spans in the text; `length` for absent ones.
      length: Length of the text.
      sentinel_NxM: Indices of the sentinels in the source of the pieces.
      present_NxM: 1 for spans that exist, 0 for padding.
    """
    rows, most = starts_NxM.shape
    starts, lengths = np.empty((2, rows, 2 * most + 1), np.int64)
    # Even columns are text, from the end of one span to the start of the next; odd columns are sentinels.
    starts[:, 0] = 0
    starts[:, 2::2], starts[:, 1::2] = ends_NxM, sentinel_NxM
    lengths[:, 0:-1:2], lengths[:, -1] = starts_NxM, length
    # A text piece ends where the next span starts, the last one at the end of the text. Absent spans start at `length`,
    # which leaves empty pieces after the last span.
    lengths[:, 0::2] -= starts[:, 0::2]
    lengths[:, 1::2] = present_NxM
    return starts, lengths


def split_at_sentinels(stream: Sequence[int], vocabulary: Vocabulary) -> list[tuple[int, list[int]]]:
    """Return (-1, tokens before the first sentinel), then (number of the sentinel, tokens after it) for each one."""
    parts: list[tuple[int, list[int]]] = [(-1, [])]
    for token in stream:
        if vocabulary.base_size <= token <= vocabulary.first_sentinel_id:
            parts.append((vocabulary.first_sentinel_id - token, []))
        else:
            parts[-1][1].append(token)
    return parts
