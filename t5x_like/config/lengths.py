"""The exact arithmetic of objectives' lengths.

It is here, in plain Python, because a recipe is checked when it is read: how many sentinels a denoiser can need and how
many raw tokens fill a row are functions of the configuration alone.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from t5x_like.config.objectives import (
    Bart,
    BlankInfilling,
    CausalLM,
    CausalMasking,
    FillInTheMiddle,
    Labelled,
    Layout,
    MaskedLM,
    Objective,
    PrefixLM,
    SpanCorruption,
    Supervised,
)

INFILLING_MARKERS = 3
"""Sentinels that fill-in-the-middle uses: for prefix, suffix and middle."""


class Lengths(NamedTuple):
    """Cells that an example takes at most, with mode token, sentinels and EOS."""

    inputs: int
    targets: int
    total: int
    """Of both; less than their sum where a longer part makes the other shorter, or where both are the same cells."""


def longest(objective: Objective, raw_length: int) -> Lengths:
    """The longest example that one window of `raw_length` tokens can become. Grows with `raw_length`."""
    mode = 0 if objective.mode is None else 1
    match objective:
        case SpanCorruption():
            noise, _ = noise_counts(objective, raw_length)
            spans = max_spans(objective, raw_length)
            inputs, targets = mode + raw_length - noise + spans + 1, noise + spans + 1
        case PrefixLM():
            fewest, most = prefix_target_range(objective, raw_length)
            return Lengths(mode + raw_length - fewest + 1, most + 1, mode + raw_length + 2)
        case CausalLM():
            inputs, targets = 0, raw_length + 1
        case MaskedLM():
            return Lengths(raw_length, raw_length, raw_length)
        case FillInTheMiddle():
            inputs, targets = 0, raw_length + (INFILLING_MARKERS if objective.fim_rate > 0 else 0) + 1
        case CausalMasking():
            inputs, targets = 0, raw_length + 2 * max_moved_spans(objective, raw_length) + 1
        case Bart():
            infilled, deleted, _ = bart_counts(objective, raw_length)
            inputs = mode + raw_length - infilled - deleted + max_infills(objective, raw_length) + 1
            targets = raw_length + 1
        case BlankInfilling():
            blank, spans = blank_count(objective, raw_length), max_blanks(objective, raw_length)
            inputs, targets = mode + raw_length - blank + spans + 1, blank + 2 * spans
        case Labelled():
            return Lengths(mode + raw_length + 1, mode + raw_length + 1, mode + raw_length + 1)
        case Supervised():
            inputs, targets = mode + raw_length + 1, raw_length + 1
    return Lengths(inputs, targets, inputs + targets)


def windows_per_row(objective: Objective) -> int:
    """Windows of raw tokens, hence examples, that one row of `objective` holds before any packing."""
    return 2 if isinstance(objective, PrefixLM) and objective.paired else 1


def row_lengths(objective: Objective, raw_length: int) -> Lengths:
    """Cells of a whole row at most, with `windows_per_row` windows of `raw_length` tokens. Grows with `raw_length`.

    A pair of prefix LM takes these cells always, whatever the cut, and less than twice its longest example.
    """
    if isinstance(objective, PrefixLM) and objective.paired:
        mode = 0 if objective.mode is None else 1
        wanted = sum(prefix_target_range(objective, raw_length))
        inputs, targets = 2 * (mode + raw_length + 1) - wanted, wanted + 2
        return Lengths(inputs, targets, inputs + targets)
    return longest(objective, raw_length)


def raw_window_length(objective: Objective, layout: Layout, inputs_length: int, targets_length: int) -> int:
    """Raw tokens per window such that the example fills its row and never overflows it.

    For span corruption in an encoder-decoder this is T5's `random_spans_helper` with the mode token and EOS inside the
    budget. In the layouts with one stream, a row has inputs_length + targets_length cells and holds inputs and targets
    one after the other, whatever the length of each. Where a row holds several windows (`windows_per_row`), this is the
    length of one.

    Returns 0 where not even two raw tokens fit.
    """

    def fits(raw_length: int) -> bool:
        cells = row_lengths(objective, raw_length)
        if layout == "encoder_decoder":
            return cells.inputs <= inputs_length and cells.targets <= targets_length
        return cells.total <= (inputs_length if layout == "encoder" else inputs_length + targets_length)

    if not fits(2):
        return 0
    fitting, too_long = 2, 4
    while fits(too_long):
        fitting, too_long = too_long, 2 * too_long
    while too_long - fitting > 1:
        middle = (fitting + too_long) // 2
        fitting, too_long = (middle, too_long) if fits(middle) else (fitting, middle)
    return fitting


def min_raw_length(objective: Objective) -> int:
    """Tokens of the shortest window that `objective` can make an example of."""
    return 1 if isinstance(objective, CausalLM | MaskedLM | FillInTheMiddle | CausalMasking) else 2


def sentinels_needed(objective: Objective, layout: Layout, inputs_length: int, targets_length: int) -> int:
    """Sentinels that a row of this shape can need: one per span; one, as the mask token, for masked LM and BART."""
    match objective:
        case MaskedLM():
            return 1
        case Bart():
            return 1 if objective.infill_rate > 0 or objective.mask_rate > 0 else 0
        case FillInTheMiddle():
            return INFILLING_MARKERS if objective.fim_rate > 0 else 0
        case PrefixLM() | CausalLM() | Supervised() | Labelled():
            return 0
    window = raw_window_length(objective, layout, inputs_length, targets_length)
    if not window:
        return 0
    match objective:
        case CausalMasking():
            return max_moved_spans(objective, window)
        case BlankInfilling():
            return max_blanks(objective, window)
    return max_spans(objective, window)


def expected_loss_tokens(objective: Objective, length: int) -> float:
    """Mean number of scored tokens of a window of `length` raw tokens, sentinels and EOS included.

    For masked LM of whole words this is the most: what they leave of it depends on the text.
    """
    match objective:
        case SpanCorruption():
            noise, spans = noise_counts(objective, length)
            return noise + spans + (0.0 if objective.t5_exact else expected_cuts(noise, spans, length)) + 1
        case PrefixLM():
            return sum(prefix_target_range(objective, length)) / 2 + 1
        case MaskedLM():
            return masked_count(objective, length)
        case FillInTheMiddle():
            return length + INFILLING_MARKERS * objective.fim_rate + 1
        case CausalMasking():
            law = moved_spans_law(objective, length)
            return length + sum(spans * share for spans, share in enumerate(law, start=1)) + 1
        case Labelled():
            return 1
        case BlankInfilling():
            blank = blank_count(objective, length)
            drawn = expected_draws(poisson(objective.mean_span_length, at_least=1), blank)
            return blank + drawn + expected_cuts(blank, drawn, length)
    return length + 1


def expected_cuts(noise: int, spans: float, length: int) -> float:
    """Mean number of spans cut by the window's ends, where the mask is rotated by a uniform offset.

    A span is cut if the window begins behind a masked token that another follows, of which there are noise - spans.
    """
    return (noise - spans) / length


# Span corruption, prefix LM, masked LM.


def noise_counts(objective: SpanCorruption, raw_length: int) -> tuple[int, int]:
    """Masked tokens and spans in a window of `raw_length` tokens: T5's `random_spans_noise_mask` arithmetic.

    Rounds half to even in float64 as Python does (T5's graph does so in float32, which differs at a few lengths).
    """
    length = max(raw_length, 2)
    noise = min(max(round(length * objective.noise_density), 1), length - 1)
    spans = max(round(noise / objective.mean_noise_span_length), 1)
    return noise, min(spans, noise, length - noise)


def max_spans(objective: SpanCorruption, raw_length: int) -> int:
    """The most spans, hence sentinels, that a window of `raw_length` tokens can get.

    The rotated placement can cut one span in two at the window's ends.
    """
    noise, spans = noise_counts(objective, raw_length)
    cut = 0 if objective.t5_exact or noise == spans else 1
    return spans + cut


def prefix_target_range(objective: PrefixLM, raw_length: int) -> tuple[int, int]:
    """Fewest and most target tokens (without EOS) of a window of `raw_length` tokens."""
    low = min(max(math.ceil(objective.min_target_fraction * raw_length), 1), raw_length - 1)
    high = min(max(math.floor(objective.max_target_fraction * raw_length), low), raw_length - 1)
    return low, high


def masked_count(objective: MaskedLM, length: int) -> int:
    """Chosen tokens of a window: BERT's max(1, round(length * mask_rate)). Of whole words, the most."""
    return min(max(round(length * objective.mask_rate), 1), length)


# Span lengths that are drawn until a number of tokens is covered: BART and GLM.


@functools.lru_cache
def poisson(mean: float, at_least: int = 0) -> tuple[float, ...]:
    """Probabilities of 0, 1, 2, ... under the Poisson law, conditioned on `at_least` or more; the tail that double
    precision cannot tell from 1 is cut off."""
    most = math.ceil(mean + 12 * math.sqrt(mean) + 12)
    law = [math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) if k >= at_least else 0.0 for k in range(most)]
    total = math.fsum(law)
    return tuple(share / total for share in law)


def expected_draws(law: tuple[float, ...], total: int) -> float:
    """Mean number of draws of `law` (which has no 0) until their sum reaches `total`."""
    return _draws_by_total(law, 1 << total.bit_length())[total]


@functools.lru_cache
def _draws_by_total(law: tuple[float, ...], most: int) -> tuple[float, ...]:
    """`expected_draws` for 0, 1, ... `most`: the renewal equation."""
    mean_N = [0.0]
    for total in range(1, most + 1):
        mean_N.append(1 + math.fsum(law[k] * mean_N[total - k] for k in range(1, min(len(law), total + 1))))
    return tuple(mean_N)


def max_draws(law: tuple[float, ...], total: int) -> int:
    """Draws of `law` for which a window is sized: four standard deviations above the mean number until the sum reaches
    `total`. Where they do not reach it, the last takes what is left: at a mean of 3, as BART and GLM have it, in one
    window of ten thousand at most."""
    mean = sum(k * share for k, share in enumerate(law))
    variance = sum(k * k * share for k, share in enumerate(law)) - mean**2
    return math.ceil(total / mean + 4 * math.sqrt(total * variance / mean**3)) + 1


def _share(rate: float, raw_length: int) -> int:
    return round(rate * raw_length)


def bart_counts(objective: Bart, raw_length: int) -> tuple[int, int, int]:
    """Tokens that are infilled, deleted and masked one by one.

    Those that are gone, infilled or deleted, are rounded together: so a longer window never has shorter inputs.
    """
    infilled = min(max(_share(objective.infill_rate, raw_length), 1), raw_length - 1) if objective.infill_rate else 0
    gone = min(max(_share(objective.infill_rate + objective.delete_rate, raw_length), infilled), raw_length - 1)
    return infilled, gone - infilled, min(_share(objective.mask_rate, raw_length), raw_length - gone)


def max_infill_draws(objective: Bart, raw_length: int) -> int:
    """Span lengths drawn at most, those of length 0 included; spans have a clean token between them."""
    infilled, _, _ = bart_counts(objective, raw_length)
    return min(max_draws(poisson(objective.mean_span_length), infilled), raw_length - infilled) if infilled else 0


def max_infills(objective: Bart, raw_length: int) -> int:
    """Mask tokens that infilling leaves at most: one span can be cut in two by the window's ends."""
    infilled, _, _ = bart_counts(objective, raw_length)
    return max_infill_draws(objective, raw_length) + (1 if infilled > 1 else 0)


def blank_count(objective: BlankInfilling, raw_length: int) -> int:
    """Tokens that are blanked out: at most half of them, so that each can be a span of its own."""
    return max(min(_share(objective.mask_rate, raw_length), raw_length // 2), 1)


def max_blank_draws(objective: BlankInfilling, raw_length: int) -> int:
    """Span lengths drawn at most."""
    blank = blank_count(objective, raw_length)
    return min(max_draws(poisson(objective.mean_span_length, at_least=1), blank), blank)


def max_blanks(objective: BlankInfilling, raw_length: int) -> int:
    """The most spans, hence sentinels: one span of two tokens or more can be cut in two by the window's ends."""
    return min(max_blank_draws(objective, raw_length) + 1, blank_count(objective, raw_length))


# Causal masking.


def max_moved_spans(objective: CausalMasking, raw_length: int) -> int:
    """The most spans: k of them have 2k different ends among the raw_length + 1 places."""
    return min(objective.max_spans, (raw_length + 1) // 2)


def moved_spans_law(objective: CausalMasking, raw_length: int) -> tuple[float, ...]:
    """Probabilities of 1, 2, ... spans."""
    most = max_moved_spans(objective, raw_length)
    law = [objective.mean_spans**k / math.factorial(k) for k in range(1, most + 1)]
    return tuple(share / sum(law) for share in law)
