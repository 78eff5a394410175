"""What the configuration says of the noise, exactly, and how well a sample of it fits."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like.config.lengths import (
    blank_count,
    expected_cuts,
    masked_count,
    moved_spans_law,
    noise_counts,
    poisson,
    prefix_target_range,
    windows_per_row,
)
from t5x_like.config.objectives import (
    BlankInfilling,
    CausalMasking,
    FillInTheMiddle,
    MaskedLM,
    Objective,
    PrefixLM,
    SpanCorruption,
)
from t5x_like.data.chi_square import Fit, compare, multinomial
from t5x_like.data.rows import Example
from t5x_like.data.vocabulary import NUM_SPECIAL, Vocabulary

Floats = npt.NDArray[np.floating[Any]]

_FEWEST_EXPECTED = 5.0
_MOST_BINS = 50
_FRACTION_BINS = 20


@dataclasses.dataclass(frozen=True)
class Observed:
    """What the laws need of one example.

    Attributes:
      raw_length: Tokens of its window.
      masked: Its raw tokens that are predicted.
      spans: Lengths of its masked spans; one that the window's ends cut counts once.
      cut: Whether a span was cut by them.
      outcome: Of an objective with few outcomes, which.
      first: False for the second of a pair, which is a function of the first.
    """

    raw_length: int
    masked: int
    spans: tuple[int, ...] = ()
    cut: bool = False
    outcome: tuple[int, ...] = ()
    first: bool = True


def observe(
    example: Example, raw_length: int, objective: Objective, vocabulary: Vocabulary, *, first: bool = True
) -> Observed:
    """What one example shows of its objective's law."""
    low, high = vocabulary.base_size, vocabulary.first_sentinel_id
    is_sentinel = (example.targets >= low) & (example.targets <= high)
    if isinstance(objective, SpanCorruption | BlankInfilling):
        # GLM ends each span by EOS.
        ends = isinstance(objective, BlankInfilling)
        starts = np.append(np.flatnonzero(is_sentinel), len(example.targets) - (0 if ends else 1))
        order = np.argsort(-example.targets[starts[:-1]])
        lengths = (np.diff(starts) - (2 if ends else 1))[order].tolist()
        text = example.inputs[0 if objective.mode is None else 1 : -1]
        cut = len(text) > 0 and len(lengths) > 1 and bool(min(text[0], text[-1]) >= low)
        if cut:
            lengths = [lengths[0] + lengths[-1], *lengths[1:-1]]
        return Observed(raw_length, sum(lengths), tuple(lengths), cut)
    if isinstance(objective, MaskedLM):
        known = example.scored[: len(example.inputs)]
        inputs, targets = example.inputs[known], example.targets[: len(example.inputs)][known]
        masked, same = int((inputs == vocabulary.mask_id).sum()), int((inputs == targets).sum())
        return Observed(raw_length, int(example.scored.sum()), outcome=(masked, int(known.sum()) - masked - same, same))
    if isinstance(objective, CausalMasking | FillInTheMiddle):
        return Observed(raw_length, raw_length, outcome=(int(is_sentinel.sum()),))
    masked = int((example.scored & ~is_sentinel).sum()) - 1
    return Observed(raw_length, masked, first=first)


def fits(objective: Objective, observed: Sequence[Observed], vocabulary: Vocabulary) -> list[Fit]:
    """The sample beside each law of its objective; none for objectives that leave nothing to chance."""
    law = _LAWS.get(type(objective))
    return law(objective, observed, vocabulary) if law and observed else []


# Span corruption.


def composition_law(total: int, parts: int) -> Floats:
    """[total + 1]: probability that a given part of a uniform composition of `total` into `parts` positive integers is
    k: C(total - k - 1, parts - 2) / C(total - 1, parts - 1)."""
    law = np.zeros(total + 1)
    if parts == 1:
        law[total] = 1.0
        return law
    k = np.arange(1, total - parts + 2)
    law[k] = np.exp(_log_choose(total - k - 1, parts - 2) - _log_choose(np.array([total - 1]), parts - 1))
    return law


def pair_law(total: int, parts: int) -> Floats:
    """[total + 1, total + 1]: joint probability of two given parts, k and l: C(total - k - l - 1, parts - 3) /
    C(total - 1, parts - 1)."""
    law = np.zeros((total + 1, total + 1))
    if parts == 2:
        k = np.arange(1, total)
        law[k, total - k] = composition_law(total, 2)[k]
    elif parts > 2:
        one, other = np.indices(law.shape)
        here = (one >= 1) & (other >= 1) & (one + other <= total - parts + 2)
        rest = total - one[here] - other[here] - 1
        law[here] = np.exp(_log_choose(rest, parts - 3) - _log_choose(np.array([total - 1]), parts - 1))
    return law


def _span_fits(objective: SpanCorruption, observed: Sequence[Observed], vocabulary: Vocabulary) -> list[Fit]:
    del vocabulary
    groups: collections.Counter[tuple[int, int]] = collections.Counter()
    lengths: collections.Counter[int] = collections.Counter()
    forbidden = cuts = 0
    expected_cut, variance = 0.0, 0.0
    for one in observed:
        noise, spans = noise_counts(objective, one.raw_length)
        if (one.masked, len(one.spans)) != (noise, spans) or min(one.spans) < 1:
            forbidden += 1
            continue
        groups[noise, spans] += 1
        lengths.update(one.spans)
        cuts += one.cut
        share = 0.0 if objective.t5_exact else expected_cuts(noise, spans, one.raw_length)
        expected_cut, variance = expected_cut + share, variance + share * (1 - share)
    if not groups:
        return [Fit("span lengths", (), np.zeros(0), np.zeros(0), 0.0, forbidden, np.zeros(0))]
    cut = compare(
        "spans cut by the window's ends",
        ("cut", "whole"),
        np.array([cuts, sum(groups.values()) - cuts]),
        np.array([expected_cut, sum(groups.values()) - expected_cut]),
        variance * np.array([[1.0, -1.0], [-1.0, 1.0]]),
    )
    return [_length_fit(groups, lengths, forbidden), cut]


def _length_fit(groups: Mapping[tuple[int, int], int], lengths: Mapping[int, int], forbidden: int) -> Fit:
    """Span lengths over examples of (noise tokens, spans); the longest, which are rare, are one outcome."""
    longest = max(noise - spans + 1 for noise, spans in groups)
    expected = np.zeros(longest + 1)
    for (noise, spans), count in groups.items():
        expected[: noise + 1] += count * spans * composition_law(noise, spans)[: longest + 1]
    starts = _bins(expected)
    bin_L = np.searchsorted(starts, np.arange(longest + 1), side="right") - 1
    covariance = np.zeros((len(starts), len(starts)))
    for (noise, spans), count in groups.items():
        one = composition_law(noise, spans)
        own = np.minimum(np.arange(noise + 1), longest)
        into = np.zeros((noise + 1, len(starts)))
        into[np.arange(noise + 1), np.maximum(bin_L[own], 0)] = 1.0
        mean = spans * (one @ into)
        second = into.T @ (spans * np.diag(one) + spans * (spans - 1) * pair_law(noise, spans)) @ into
        covariance += count * (second - np.outer(mean, mean))
    measured = np.zeros(len(starts))
    for length, count in lengths.items():
        measured[bin_L[min(length, longest)]] += count
    binned = np.bincount(np.maximum(bin_L, 0), weights=expected, minlength=len(starts))
    labels, widths = _outcomes(starts, longest)
    return compare("span lengths", labels, measured, binned, covariance, forbidden, widths)


def _bins(expected_L: Floats) -> npt.NDArray[np.int64]:
    """First lengths of bins, from 1 on, each expected often enough."""
    starts, total = [1], 0.0
    rest = float(expected_L[1:].sum())
    enough = max(_FEWEST_EXPECTED, rest / _MOST_BINS)
    for length in range(1, len(expected_L)):
        if total >= enough and rest >= enough:
            starts.append(length)
            total = 0.0
        total += expected_L[length]
        rest -= expected_L[length]
    return np.array(starts, np.int64)


def _outcomes(starts: npt.NDArray[np.int64], longest: int) -> tuple[tuple[str, ...], Floats]:
    """Labels of bins of lengths, and how many lengths each has."""
    lasts = np.append(starts[1:] - 1, longest)
    pairs = zip(starts.tolist(), lasts.tolist(), strict=True)
    labels = tuple(f"{first:,}" if first == last else f"{first:,}–{last:,}" for first, last in pairs)
    return labels, lasts - starts + 1.0


# GLM.


def renewal_lengths(law: Sequence[float], total: int) -> Floats:
    """[total + 1]: expected number of spans of each length if lengths are drawn from `law` (which has no 0) until they
    sum to `total`, the last one cut: the renewal equation for the places where spans begin."""
    drawn = np.zeros(total + 1)
    drawn[: len(law)] = law[: total + 1]
    beyond = 1.0 - np.cumsum(drawn)
    begins = np.zeros(total + 1)
    begins[0] = 1.0
    for place in range(1, total):
        begins[place] = begins[:place] @ drawn[place:0:-1]
    wanted = np.zeros(total + 1)
    for length in range(1, total + 1):
        wanted[length] = begins[: total - length + 1].sum() * drawn[length] + begins[total - length] * beyond[length]
    return wanted


def _blank_fits(objective: BlankInfilling, observed: Sequence[Observed], vocabulary: Vocabulary) -> list[Fit]:
    """Lengths of the blanks. Those of an example depend on each other in a way that has no short formula: their
    covariance is the one that is measured."""
    del vocabulary
    counts = collections.Counter(blank_count(objective, one.raw_length) for one in observed)
    law = poisson(objective.mean_span_length, at_least=1)
    longest = max(counts)
    expected = np.zeros(longest + 1)
    for blank, examples in counts.items():
        expected[: blank + 1] += examples * renewal_lengths(law, blank)
    allowed = [one for one in observed if one.masked == blank_count(objective, one.raw_length)]
    starts = _bins(expected)
    found = np.zeros((len(allowed), len(starts)))
    for row, one in enumerate(allowed):
        found[row] = np.bincount(np.searchsorted(starts, one.spans, side="right") - 1, minlength=len(starts))
    binned = np.add.reduceat(expected, starts)
    covariance = len(allowed) * np.atleast_2d(np.cov(found.T)) if len(allowed) > 1 else np.zeros((len(starts),) * 2)
    labels, widths = _outcomes(starts, longest)
    fit = compare(
        "span lengths",
        labels,
        found.sum(axis=0),
        binned,
        covariance,
        len(observed) - len(allowed),
        widths,
    )
    # The measured covariance of few examples is none.
    return [fit if fit.forbidden or len(allowed) > 10 * len(starts) else dataclasses.replace(fit, p_value=None)]


# Prefix LM.


def _prefix_fits(objective: PrefixLM, observed: Sequence[Observed], vocabulary: Vocabulary) -> list[Fit]:
    """The target fraction in equal bins. Of a pair of windows the second is a function of the first: it is left out."""
    del vocabulary
    low, high = objective.min_target_fraction, objective.max_target_fraction
    counted = [one for one in observed if one.first or windows_per_row(objective) == 1]
    bins = max(min(_FRACTION_BINS, int(len(counted) / (2 * _FEWEST_EXPECTED))), 1)
    width = max(high - low, 1e-9) / bins
    measured, expected, covariance = np.zeros(bins), np.zeros(bins), np.zeros((bins, bins))
    forbidden = 0

    def bin_of(targets: npt.NDArray[Any], length: int) -> npt.NDArray[np.int64]:
        return np.clip(((targets / length - low) / width + 1e-9).astype(np.int64), 0, bins - 1)

    by_length: dict[int, list[int]] = {}
    for one in counted:
        by_length.setdefault(one.raw_length, []).append(one.masked)
    for length, targets in by_length.items():
        fewest, most = prefix_target_range(objective, length)
        allowed = np.array([count for count in targets if fewest <= count <= most], np.int64)
        forbidden += len(targets) - len(allowed)
        measured += np.bincount(bin_of(allowed, length), minlength=bins)
        law = np.bincount(bin_of(np.arange(fewest, most + 1), length), minlength=bins) / (most - fewest + 1)
        expected += len(allowed) * law
        covariance += len(allowed) * (np.diag(law) - np.outer(law, law))
    edges = low + width * np.arange(bins + 1)
    labels = tuple(f"{100 * a:.0f}–{100 * b:.0f} %" for a, b in zip(edges[:-1], edges[1:], strict=True))
    return [compare("target fraction", labels, measured, expected, covariance, forbidden)]


# Objectives of few outcomes.


def _mask_fits(objective: MaskedLM, observed: Sequence[Observed], vocabulary: Vocabulary) -> list[Fit]:
    """What became of the chosen tokens. A random piece can be the token itself, and then counts as kept. With `span`, a
    run has one fate, so that its tokens are not independent draws."""
    most = [masked_count(objective, one.raw_length) for one in observed]
    exact = objective.unit != "word"
    forbidden = sum(one.masked > m or (exact and one.masked < m) for one, m in zip(observed, most, strict=True))
    measured = np.sum([one.outcome for one in observed], axis=0).astype(np.float64)
    other = objective.replace_with_random * (1 - 1 / max(vocabulary.base_size - NUM_SPECIAL, 1))
    law = np.array([objective.replace_with_mask, other, 1 - objective.replace_with_mask - other])
    labels = ("mask token", "another piece", "kept")
    fit = multinomial("chosen tokens became", labels, measured, law, forbidden)
    return [dataclasses.replace(fit, p_value=None) if objective.unit == "span" else fit]


def _moved_fits(objective: CausalMasking, observed: Sequence[Observed], vocabulary: Vocabulary) -> list[Fit]:
    del vocabulary
    groups = collections.Counter(one.raw_length for one in observed)
    laws = {length: np.array(moved_spans_law(objective, length)) for length in groups}
    most = max(map(len, laws.values()))
    measured, expected, covariance = np.zeros(most), np.zeros(most), np.zeros((most, most))
    for length, count in groups.items():
        law = np.pad(laws[length], (0, most - len(laws[length])))
        expected += count * law
        covariance += count * (np.diag(law) - np.outer(law, law))
    forbidden = 0
    for one in observed:
        spans, odd = divmod(one.outcome[0], 2)
        if odd or not 1 <= spans <= most:
            forbidden += 1
        else:
            measured[spans - 1] += 1
    labels = tuple(str(spans) for spans in range(1, most + 1))
    return [compare("spans per window", labels, measured, expected, covariance, forbidden)]


def _middle_fits(objective: FillInTheMiddle, observed: Sequence[Observed], vocabulary: Vocabulary) -> list[Fit]:
    del vocabulary
    counts = collections.Counter(one.outcome[0] for one in observed)
    measured = np.array([counts[3], counts[0]], np.float64)
    law = np.array([objective.fim_rate, 1 - objective.fim_rate])
    forbidden = len(observed) - int(measured.sum())
    return [multinomial("windows", ("rearranged", "left as they are"), measured, law, forbidden)]


_LAWS: dict[type, Callable[..., list[Fit]]] = {
    SpanCorruption: _span_fits,
    BlankInfilling: _blank_fits,
    PrefixLM: _prefix_fits,
    MaskedLM: _mask_fits,
    CausalMasking: _moved_fits,
    FillInTheMiddle: _middle_fits,
}


def _log_choose(n: npt.NDArray[np.int64], k: int) -> Floats:
    table = _log_factorials(int(n.max(initial=0)))
    return table[n] - table[k] - table[n - k]


@functools.lru_cache(maxsize=8)
def _log_factorials(most: int) -> Floats:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, most + 1)))])
