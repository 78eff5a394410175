"""The exact arithmetic of objectives' lengths.

It is here, in plain Python, because a recipe is checked when it is read: how many sentinels a denoiser can need and how
many raw tokens fill a row are functions of the configuration alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from t5x_like.config.objectives import CausalLM, Layout, MaskedLM, Objective, PrefixLM, SpanCorruption, Supervised


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


class Lengths(NamedTuple):
    """Cells that an example takes at most, with mode token, sentinels and EOS."""

    inputs: int
    targets: int
    total: int
    """Of both; less than their sum where a longer part makes the other shorter."""


def longest(objective: Objective, raw_length: int) -> Lengths:
    """The longest example that one window of `raw_length` tokens can become. Grows with `raw_length`."""
    mode = 0 if objective.mode is None else 1
    if isinstance(objective, SpanCorruption):
        noise, _ = noise_counts(objective, raw_length)
        spans = max_spans(objective, raw_length)
        inputs, targets = mode + raw_length - noise + spans + 1, noise + spans + 1
        return Lengths(inputs, targets, inputs + targets)
    if isinstance(objective, PrefixLM):
        fewest, most = prefix_target_range(objective, raw_length)
        return Lengths(mode + raw_length - fewest + 1, most + 1, mode + raw_length + 2)
    if isinstance(objective, CausalLM):
        return Lengths(0, raw_length + 1, raw_length + 1)
    if isinstance(objective, Supervised):
        return Lengths(mode + raw_length + 1, raw_length + 1, mode + 2 * raw_length + 2)
    return Lengths(raw_length, raw_length, raw_length)


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
    length = 2
    while fits(length + 1):
        length += 1
    return length


def prefix_target_range(objective: PrefixLM, raw_length: int) -> tuple[int, int]:
    """Fewest and most target tokens (without EOS) of a window of `raw_length` tokens."""
    low = min(max(math.ceil(objective.min_target_fraction * raw_length), 1), raw_length - 1)
    high = min(max(math.floor(objective.max_target_fraction * raw_length), low), raw_length - 1)
    return low, high


def sentinels_needed(objective: Objective, layout: Layout, inputs_length: int, targets_length: int) -> int:
    """Sentinels that a row of this shape can need: one per span; one, as the mask token, for masked LM."""
    if isinstance(objective, MaskedLM):
        return 1
    if not isinstance(objective, SpanCorruption):
        return 0
    window = raw_window_length(objective, layout, inputs_length, targets_length)
    return max_spans(objective, window) if window else 0


def masked_count(objective: MaskedLM, length: int) -> int:
    """Chosen tokens of a window: BERT's max(1, round(length * mask_rate))."""
    return min(max(round(length * objective.mask_rate), 1), length)


def expected_loss_tokens(objective: Objective, length: int) -> float:
    """Mean number of scored tokens of a window of `length` raw tokens, sentinels and EOS included."""
    if isinstance(objective, SpanCorruption):
        noise, spans = noise_counts(objective, length)
        # A rotation cuts a span if it begins behind a masked token that another follows: noise - spans places.
        cut = 0.0 if objective.t5_exact else (noise - spans) / length
        return noise + spans + cut + 1
    if isinstance(objective, PrefixLM):
        return sum(prefix_target_range(objective, length)) / 2 + 1
    if isinstance(objective, CausalLM | Supervised):
        return length + 1
    return masked_count(objective, length)
