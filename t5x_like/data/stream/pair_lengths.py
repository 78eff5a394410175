"""Lengths to which supervised pairs are truncated, so that each fits its row."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from t5x_like.config.data import DataConfig
from t5x_like.utils.type_aliases import IntArray


@dataclasses.dataclass(frozen=True)
class CutPairs:
    """Ranges of pairs that fit a row.

    Attributes:
      inputs_NxB, targets_NxB: [N, 2] (start, stop); the end of a longer part is cut.
      cut_inputs_N, cut_targets_N: True where a part was cut. Cut targets get no EOS: the answer did not end there.
    """

    inputs_NxB: IntArray
    targets_NxB: IntArray
    cut_inputs_N: npt.NDArray[np.bool_]
    cut_targets_N: npt.NDArray[np.bool_]


def cut_pairs(inputs_NxB: IntArray, targets_NxB: IntArray, data: DataConfig, mode_tokens: int) -> CutPairs:
    """Truncate pairs to the length of a row.

    The two stacks of an encoder-decoder have a length each. In a single stream, inputs and targets share the row:
    each may be as long as the other leaves room for, and if both are longer than their own length, `inputs_length` and
    `targets_length`, each is cut to it.

    Args:
      inputs_NxB, targets_NxB: [N, 2] (start, stop) of the inputs and of the targets, without EOS.
      data: Lengths and layout of the rows.
      mode_tokens: Number of mode tokens in front of the inputs.
    """
    given_N, answer_N = (np.diff(part)[:, 0] for part in (inputs_NxB, targets_NxB))
    max_inputs = max(data.inputs_length - mode_tokens - 1, 0)  # EOS.
    if len(data.row_positions) == 2:
        max_inputs_N = np.full_like(given_N, max_inputs)
        max_targets_N = np.full_like(answer_N, data.targets_length - 1)
    else:
        both = data.row_length - mode_tokens - 2  # Two EOS.
        max_inputs_N = np.maximum(max_inputs, both - answer_N)
        max_targets_N = np.maximum(both - max_inputs, both - given_N)
    return CutPairs(
        inputs_NxB=np.stack([inputs_NxB[:, 0], inputs_NxB[:, 0] + np.minimum(given_N, max_inputs_N)], axis=1),
        targets_NxB=np.stack([targets_NxB[:, 0], targets_NxB[:, 0] + np.minimum(answer_N, max_targets_N)], axis=1),
        cut_inputs_N=given_N > max_inputs_N,
        cut_targets_N=answer_N > max_targets_N,
    )
