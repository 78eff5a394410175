"""What all objectives return."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from t5x_like.data.vocabulary import PAD_ID

Tokens = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Examples:
    """N examples of one objective, padded with 0 at the right.

    Attributes:
      inputs_NxI: Mode token, text and sentinels, EOS; empty rows for objectives without inputs; the masked text for
        masked LM.
      targets_NxT: Ends in EOS, except for masked LM, where it is the raw text.
      input_lengths_N, target_lengths_N: Tokens that are not padding.
      scored_NxT: Target positions that are predicted; None means all of them.
      aligned: Each target is the raw token of the input in the same place (masked LM), so that both take the same
        cells; otherwise the targets follow the inputs.
    """

    inputs_NxI: Tokens
    targets_NxT: Tokens
    input_lengths_N: npt.NDArray[np.int64]
    target_lengths_N: npt.NDArray[np.int64]
    scored_NxT: Mask | None = None
    aligned: bool = False


def concatenate(
    source_NxS: Tokens, starts_NxP: npt.NDArray[np.int64], lengths_NxP: npt.NDArray[np.int64], width: int
) -> tuple[Tokens, npt.NDArray[np.int64]]:
    """Each row as a sequence of pieces of its source: ([N, width] padded with 0, the lengths).

    Args:
      source_NxS: What the pieces are cut from: the row's text, and behind it what the objective adds.
      starts_NxP, lengths_NxP: The pieces in the order in which they are put together; a length may be 0.
      width: Cells of a row, at least as many as the longest row takes.
    """
    rows, size = source_NxS.shape
    lengths = lengths_NxP.ravel()
    begins = (starts_NxP + np.arange(rows)[:, None] * size).ravel()
    ends = np.cumsum(lengths)
    total_N = lengths_NxP.sum(axis=1)
    cells = np.arange(ends[-1]) + np.repeat(begins - ends + lengths, lengths)
    joined_NxW = np.full((rows, width), PAD_ID, np.int32)
    joined_NxW[np.arange(width) < total_N[:, None]] = source_NxS.ravel().take(cells)
    return joined_NxW, total_N
