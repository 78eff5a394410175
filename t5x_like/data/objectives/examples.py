"""Examples: the result of denoising, and the assembly of rows from pieces."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from t5x_like.data.tokenizers.vocabulary import PAD_ID

Tokens = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Examples:
    """N examples of one objective, padded with 0 on the right.

    Attributes:
      inputs_NxI: Mode token, text with sentinels, EOS. Rows have length 0 for objectives without inputs; for masked LM
        they are the masked text.
      targets_NxT: Targets ended by EOS; for masked LM the raw text.
      input_lengths_N, target_lengths_N: Numbers of tokens that are not padding.
      scored_NxT: Mask of the target positions that the loss covers; None: all positions.
      scored_weight_N: Loss weight of each scored token of an example; None: 1.
      aligned: True if each target is the raw token of the input at the same position (masked LM), so that inputs and
        targets share their positions; otherwise the targets follow the inputs.
      masked_targets_NxT: What the decoder of an encoder-decoder reads: the start token (0, as the converters write it),
        and after it the targets with masked tokens at their own positions. None: it reads the targets shifted by one.
    """

    inputs_NxI: Tokens
    targets_NxT: Tokens
    input_lengths_N: npt.NDArray[np.int64]
    target_lengths_N: npt.NDArray[np.int64]
    scored_NxT: Mask | None = None
    aligned: bool = False
    scored_weight_N: npt.NDArray[np.float64] | None = None
    masked_targets_NxT: Tokens | None = None


def without_inputs(targets_NxT: Tokens, target_lengths_N: npt.NDArray[np.int64]) -> Examples:
    """Return examples that have targets only, all of them scored."""
    rows = len(targets_NxT)
    return Examples(np.zeros((rows, 0), np.int32), targets_NxT, np.zeros(rows, np.int64), target_lengths_N)


def concatenate(
    source_NxS: Tokens, starts_NxP: npt.NDArray[np.int64], lengths_NxP: npt.NDArray[np.int64], width: int
) -> tuple[Tokens, npt.NDArray[np.int64]]:
    """Return rows that are assembled from pieces of their sources ([N, width], padded with 0), and their lengths [N].

    Args:
      source_NxS: Rows that the pieces are cut from: the text, followed by the tokens that the objective adds.
      starts_NxP, lengths_NxP: Start and length of each piece, in the order of assembly; a length may be 0.
      width: Length of the returned rows, at least that of the longest one.
    """
    rows, size = source_NxS.shape
    lengths = lengths_NxP.ravel()
    # Positions in the flattened source; the pieces of all rows are then one list.
    begins = (starts_NxP + np.arange(rows)[:, None] * size).ravel()
    ends = np.cumsum(lengths)
    total_N = lengths_NxP.sum(axis=1)
    # Index of every token of the result in the flattened source: within a piece the index counts up by 1, so that
    # index - output position is constant (begin - output start) and can be repeated for the whole piece.
    token_index = np.arange(ends[-1]) + np.repeat(begins - ends + lengths, lengths)
    joined_NxW = np.full((rows, width), PAD_ID, np.int32)
    # The mask selects total_N[n] places of row n, row by row: the order in which `token_index` lists the tokens.
    joined_NxW[np.arange(width) < total_N[:, None]] = source_NxS.ravel().take(token_index)
    return joined_NxW, total_N


def scored_part(examples: Examples, first: int, count: int) -> Examples:
    """Return the examples with a loss on `count` target positions from `first` on only."""
    scored_NxT = np.zeros(examples.targets_NxT.shape, np.bool_)
    scored_NxT[:, first : first + count] = True
    return dataclasses.replace(examples, scored_NxT=scored_NxT)
