"""Distributions of span lengths, and the comparison of a sample of span lengths with them.

Each objective compares its own noise with its configuration (`ObjectiveImplementation.noise_fits`); this module holds
the computations that several of them share.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from t5x_like.data.inspection.goodness_of_fit import Fit, compare
from t5x_like.data.tokenizers.vocabulary import Vocabulary

Floats = npt.NDArray[np.floating[Any]]

MIN_EXPECTED_COUNT = 5.0
"""Minimum expected count of a bin, for the chi-square approximation to hold."""
_MAX_BINS = 50


@dataclasses.dataclass(frozen=True)
class ObservedNoise:
    """Properties of one example that its objective's distributions concern.

    Attributes:
      raw_length: Number of tokens of its window.
      masked: Number of its raw tokens that are predicted.
      spans: Lengths of its masked spans; a span that the ends of the window cut counts once.
      cut: True if the ends of the window cut a span.
      outcome: For objectives with few possible outcomes, the one of this example.
      first: False for the second window of a pair, whose noise is a function of the first one's.
    """

    raw_length: int
    masked: int
    spans: tuple[int, ...] = ()
    cut: bool = False
    outcome: tuple[int, ...] = ()
    first: bool = True

    @classmethod
    def of_spans(cls, raw_length: int, lengths: Sequence[int], text: npt.NDArray[Any], vocabulary: Vocabulary) -> Self:
        """Return the observation of an example with sentinels in its inputs.

        Args:
          raw_length: Number of tokens of the window.
          lengths: Lengths of the spans in the order of their sentinels.
          text: The inputs without mode token and EOS. The first and the last span are one span that the ends of the
            window cut if the text begins and ends with a sentinel.
          vocabulary: Ids of the sentinels.
        """
        cut = len(text) > 0 and len(lengths) > 1 and bool(min(text[0], text[-1]) >= vocabulary.base_size)
        if cut:
            lengths = [lengths[0] + lengths[-1], *lengths[1:-1]]
        return cls(raw_length, sum(lengths), tuple(lengths), cut)


def composition_distribution(total: int, parts: int) -> Floats:
    """Return the distribution of one part of a uniform composition of `total` into positive integers ([total + 1]).

    The probability that a given one of `parts` parts is k is C(total - k - 1, parts - 2) / C(total - 1, parts - 1).
    """
    probability = np.zeros(total + 1)
    if parts == 1:
        probability[total] = 1.0
        return probability
    # The other parts have at least one each and sum to total - k, in C(total - k - 1, parts - 2) ways.
    k = np.arange(1, total - parts + 2)
    probability[k] = np.exp(_log_choose(total - k - 1, parts - 2) - _log_choose(np.array([total - 1]), parts - 1))
    return probability


def composition_pair_distribution(total: int, parts: int) -> Floats:
    """Return the joint distribution of two parts of a uniform composition ([total + 1, total + 1]).

    The probability that two given parts are k and l is C(total - k - l - 1, parts - 3) / C(total - 1, parts - 1).
    """
    probability = np.zeros((total + 1, total + 1))
    if parts == 2:
        k = np.arange(1, total)
        probability[k, total - k] = composition_distribution(total, 2)[k]
    elif parts > 2:
        one, other = np.indices(probability.shape)
        # As above, with two parts given: the remaining parts - 2 sum to total - k - l.
        possible = (one >= 1) & (other >= 1) & (one + other <= total - parts + 2)
        rest = total - one[possible] - other[possible] - 1
        log_count = _log_choose(np.array([total - 1]), parts - 1)
        probability[possible] = np.exp(_log_choose(rest, parts - 3) - log_count)
    return probability


def expected_span_counts(probabilities: Sequence[float], total: int) -> Floats:
    """Return the expected number of spans of each length in one example ([total + 1]).

    Lengths are drawn from `probabilities` (which has no 0) until they sum to `total`, the last one cut. The positions
    where spans begin follow the renewal equation.
    """
    drawn = np.zeros(total + 1)
    drawn[: len(probabilities)] = probabilities[: total + 1]
    # Probability of a length above k, of which the total leaves k.
    beyond = 1.0 - np.cumsum(drawn)
    begins = np.zeros(total + 1)
    begins[0] = 1.0
    for position in range(1, total):
        # A span begins at a position if one began k before it and has length k (renewal equation).
        begins[position] = begins[:position] @ drawn[position:0:-1]
    expected = np.zeros(total + 1)
    for length in range(1, total + 1):
        # A whole span that ends at or before the total, or a longer one that the total cuts to this length.
        whole = begins[: total - length + 1].sum() * drawn[length]
        expected[length] = whole + begins[total - length] * beyond[length]
    return expected


def fit_composition_lengths(groups: Mapping[tuple[int, int], int], lengths: Mapping[int, int], forbidden: int) -> Fit:
    """Compare span lengths with uniform compositions.

    Args:
      groups: Number of examples by (masked tokens, spans).
      lengths: Number of spans by length. The longest lengths, which are rare, are one outcome.
      forbidden: Number of examples that the configuration cannot produce.
    """
    longest = max(noise - spans + 1 for noise, spans in groups)
    expected = np.zeros(longest + 1)
    for (noise, spans), count in groups.items():
        expected[: noise + 1] += count * spans * composition_distribution(noise, spans)[: longest + 1]
    starts = length_bins(expected)
    bin_L = np.searchsorted(starts, np.arange(longest + 1), side="right") - 1
    covariance = np.zeros((len(starts), len(starts)))
    for (noise, spans), count in groups.items():
        # Covariance of the binned counts of one example, from the distributions of one part and of two parts.
        one = composition_distribution(noise, spans)
        own = np.minimum(np.arange(noise + 1), longest)
        into = np.zeros((noise + 1, len(starts)))
        into[np.arange(noise + 1), np.maximum(bin_L[own], 0)] = 1.0
        # All parts have the same distribution and all pairs of parts the same joint one, so one of each is enough.
        mean = spans * (one @ into)
        pairs = spans * (spans - 1) * composition_pair_distribution(noise, spans)
        second = into.T @ (spans * np.diag(one) + pairs) @ into
        covariance += count * (second - np.outer(mean, mean))
    measured = np.zeros(len(starts))
    for length, count in lengths.items():
        measured[bin_L[min(length, longest)]] += count
    binned = np.bincount(np.maximum(bin_L, 0), weights=expected, minlength=len(starts))
    labels, widths = length_labels(starts, longest)
    return compare("span lengths", labels, measured, binned, covariance, forbidden, widths)


def length_bins(expected_L: Floats) -> npt.NDArray[np.int64]:
    """Return the first length of each bin, beginning with 1, such that each bin has a sufficient expected count."""
    starts, total = [1], 0.0
    rest = float(expected_L[1:].sum())
    enough = max(MIN_EXPECTED_COUNT, rest / _MAX_BINS)
    for length in range(1, len(expected_L)):
        # Only if both the bin and the remaining lengths suffice: the last bin must not be too small either.
        if total >= enough and rest >= enough:
            starts.append(length)
            total = 0.0
        total += expected_L[length]
        rest -= expected_L[length]
    return np.array(starts, np.int64)


def length_labels(starts: npt.NDArray[np.int64], longest: int) -> tuple[tuple[str, ...], Floats]:
    """Return the labels of bins of lengths, and the number of lengths in each bin."""
    lasts = np.append(starts[1:] - 1, longest)
    bounds = zip(starts.tolist(), lasts.tolist(), strict=True)
    labels = tuple(f"{first:,}" if first == last else f"{first:,}–{last:,}" for first, last in bounds)
    return labels, lasts - starts + 1.0


def _log_choose(n: npt.NDArray[np.int64], k: int) -> Floats:
    table = _log_factorials(int(n.max(initial=0)))
    # Binomials of thousands of tokens overflow a float; differences of logarithms do not.
    return table[n] - table[k] - table[n - k]


@functools.lru_cache(maxsize=8)
def _log_factorials(most: int) -> Floats:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, most + 1)))])
