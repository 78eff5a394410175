"""Infilling in one stream: fill-in-the-middle, CM3's causal masking, GLM's blanks. Spans move, no token is lost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from t5x_like.config.lengths import (
    INFILLING_MARKERS,
    blank_count,
    longest,
    max_blank_draws,
    max_blanks,
    max_moved_spans,
    moved_spans_law,
    poisson,
)
from t5x_like.config.objectives import BlankInfilling, CausalMasking, FillInTheMiddle
from t5x_like.data import keys as rng
from t5x_like.data.denoising import draws
from t5x_like.data.denoising.examples import Examples, Tokens, concatenate
from t5x_like.data.vocabulary import EOS_ID, PAD_ID, Vocabulary

Integers = npt.NDArray[np.int64]


def fill_in_the_middle(
    tokens_NxL: Tokens, keys_N: rng.Keys, objective: FillInTheMiddle, vocabulary: Vocabulary
) -> Examples:
    """PSM, SPM or the window as it is; see `FillInTheMiddle` for the law."""
    rows, length = tokens_NxL.shape
    form_Nx2 = draws.uniform(keys_N, draws.FORM, 2)
    moved_N = form_Nx2[:, 0] < objective.fim_rate
    cuts_Nx2 = np.sort(rng.below(rng.bits(keys_N, draws.CUT, 2), length + 1), axis=1)
    first_N, second_N = cuts_Nx2[:, 0], cuts_Nx2[:, 1]
    prefix_first_N = moved_N & (form_Nx2[:, 1] >= objective.spm_rate)

    markers = vocabulary.infilling_ids if objective.fim_rate > 0 else (PAD_ID,) * INFILLING_MARKERS
    source = _with_extras(tokens_NxL, (*markers, EOS_ID))
    marker_N, none_N = moved_N.astype(np.int64), np.zeros(rows, np.int64)
    pieces: list[tuple[int | Integers, Integers]] = [
        (length, marker_N),
        (0, np.where(prefix_first_N, first_N, none_N)),
        (length + 1, marker_N),
        (second_N, np.where(moved_N, length - second_N, none_N)),
        (length + 2, marker_N),
        (0, np.where(prefix_first_N, none_N, first_N)),
        (first_N, second_N - first_N),
        (second_N, np.where(moved_N, none_N, length - second_N)),
        (length + 3, np.ones(rows, np.int64)),
    ]
    starts_NxP = np.stack([np.broadcast_to(np.asarray(start, np.int64), rows) for start, _ in pieces], axis=1)
    lengths_NxP = np.stack([lengths for _, lengths in pieces], axis=1)
    return _no_inputs(*concatenate(source, starts_NxP, lengths_NxP, longest(objective, length).targets))


def mask_causally(tokens_NxL: Tokens, keys_N: rng.Keys, objective: CausalMasking, vocabulary: Vocabulary) -> Examples:
    """Spans behind the text; see `CausalMasking` for the law."""
    rows, length = tokens_NxL.shape
    most = max_moved_spans(objective, length)
    count_N = draws.sample(keys_N, draws.COUNT, (0.0, *moved_spans_law(objective, length)), 1)[:, 0]
    cuts = draws.first_chosen(keys_N, draws.CUT, length + 1, 2 * most)
    cuts = np.sort(np.where(np.arange(2 * most) < 2 * count_N[:, None], cuts, length), axis=1)
    starts_NxM, ends_NxM = cuts[:, 0::2], cuts[:, 1::2]
    present_NxM = (np.arange(most) < count_N[:, None]).astype(np.int64)

    source = _with_extras(tokens_NxL, (*_sentinels(most, vocabulary), EOS_ID))
    sentinel_NxM = np.broadcast_to(length + np.arange(most), (rows, most))
    text = _text_between(starts_NxM, ends_NxM, length, sentinel_NxM, present_NxM)
    spans = (
        np.stack([sentinel_NxM, starts_NxM], axis=2).reshape(rows, -1),
        np.stack([present_NxM, ends_NxM - starts_NxM], axis=2).reshape(rows, -1),
    )
    end = np.full((rows, 1), length + most), np.ones((rows, 1), np.int64)
    starts, lengths = (np.concatenate(parts, axis=1) for parts in zip(text, spans, end, strict=True))
    examples = _no_inputs(*concatenate(source, starts, lengths, longest(objective, length).targets))

    # The k-th sentinel of the text stands behind k sentinels and all tokens before its span that are in no span.
    moved_NxM = np.cumsum(ends_NxM - starts_NxM, axis=1) - (ends_NxM - starts_NxM)
    scored = examples.targets_NxT != PAD_ID
    row_R, rank_R = np.nonzero(present_NxM)
    scored[row_R, (starts_NxM - moved_NxM)[row_R, rank_R] + rank_R] = False
    return Examples(
        examples.inputs_NxI, examples.targets_NxT, examples.input_lengths_N, examples.target_lengths_N, scored
    )


def fill_blanks(tokens_NxL: Tokens, keys_N: rng.Keys, objective: BlankInfilling, vocabulary: Vocabulary) -> Examples:
    """Part A as inputs, Part B as targets; see `BlankInfilling` for the law.

    GLM gives each cell two positions: the first is the place in Part A, for a cell of Part B that of its blank; the
    second is 0 in Part A and counts from 1 within a span. The models here read one position, the cell's place in the
    row, and need no more: each blank has a sentinel of its own, which says at the head of a span where it belongs.
    """
    rows, length = tokens_NxL.shape
    blank, most = blank_count(objective, length), max_blanks(objective, length)
    law = poisson(objective.mean_span_length, at_least=1)
    drawn = draws.lengths_until(keys_N, draws.LENGTHS, law, blank, max_blank_draws(objective, length))
    mask_NxL, _ = draws.place_on_circle(keys_N, *drawn, length)
    starts_NxM, ends_NxM, count_N = draws.edges_of(mask_NxL, most)
    present_NxM = (np.arange(most) < count_N[:, None]).astype(np.int64)

    mode = () if objective.mode is None else (vocabulary.mode_id(objective.mode),)
    source = _with_extras(tokens_NxL, (*_sentinels(most, vocabulary), EOS_ID, *mode))
    sentinel_NxM = np.broadcast_to(length + np.arange(most), (rows, most))
    end_NxM = np.full((rows, most), length + most)
    text = _text_between(starts_NxM, ends_NxM, length, sentinel_NxM, present_NxM)
    one = np.ones((rows, 1), np.int64)
    head = [(end_NxM[:, :1] + 1, one)] if mode else []
    parts = [*head, text, (end_NxM[:, :1], one)]
    starts, lengths = (np.concatenate([part[k] for part in parts], axis=1) for k in range(2))
    cells = longest(objective, length)
    inputs_NxI, input_lengths_N = concatenate(source, starts, lengths, cells.inputs)

    order_NxM = draws.random_order(keys_N, draws.ORDER, count_N, most)
    starts = np.stack([sentinel_NxM, starts_NxM, end_NxM], axis=2)
    lengths = np.stack([present_NxM, ends_NxM - starts_NxM, present_NxM], axis=2)
    starts, lengths = (np.take_along_axis(part, order_NxM[:, :, None], axis=1) for part in (starts, lengths))
    pieces = starts.reshape(rows, -1), lengths.reshape(rows, -1)
    targets_NxT, target_lengths_N = concatenate(source, *pieces, cells.targets)
    scored_NxT = (targets_NxT != PAD_ID) & (targets_NxT < vocabulary.base_size)
    return Examples(inputs_NxI, targets_NxT, input_lengths_N, target_lengths_N, scored_NxT)


def _with_extras(tokens_NxL: Tokens, ids: Sequence[int]) -> Tokens:
    """The rows with the same ids behind each."""
    extras = np.broadcast_to(np.array(ids, np.int32), (len(tokens_NxL), len(ids)))
    return np.concatenate([tokens_NxL, extras], axis=1)


def _sentinels(count: int, vocabulary: Vocabulary) -> range:
    vocabulary.sentinel_id(count - 1)
    return range(vocabulary.first_sentinel_id, vocabulary.first_sentinel_id - count, -1)


def _text_between(
    starts_NxM: Integers, ends_NxM: Integers, length: int, sentinel_NxM: Integers, present_NxM: Integers
) -> tuple[Integers, Integers]:
    """Pieces of the text with a sentinel in place of each span: starts and lengths [N, 2 M + 1]."""
    rows, most = starts_NxM.shape
    starts, lengths = np.empty((2, rows, 2 * most + 1), np.int64)
    starts[:, 0] = 0
    starts[:, 2::2], starts[:, 1::2] = ends_NxM, sentinel_NxM
    lengths[:, 0:-1:2], lengths[:, -1] = starts_NxM, length
    lengths[:, 0::2] -= starts[:, 0::2]
    lengths[:, 1::2] = present_NxM
    return starts, lengths


def _no_inputs(targets_NxT: Tokens, target_lengths_N: Integers) -> Examples:
    rows = len(targets_NxT)
    return Examples(np.zeros((rows, 0), np.int32), targets_NxT, np.zeros(rows, np.int64), target_lengths_N)


def restore_middle(stream: Sequence[int], vocabulary: Vocabulary) -> list[int]:
    """The raw window of a fill-in-the-middle example without its EOS; raises ValueError where markers are amiss."""
    tokens = list(stream)
    if vocabulary.num_sentinels < 3 or tokens[:1] != [vocabulary.infilling_ids[0]]:
        return tokens
    _, suffix_id, middle_id = vocabulary.infilling_ids
    suffix, middle = tokens.index(suffix_id), tokens.index(middle_id)
    if suffix > middle:
        raise ValueError("targets: the middle's marker stands before the suffix's")
    return tokens[1:suffix] + tokens[middle + 1 :] + tokens[suffix + 1 : middle]


def restore_causal(stream: Sequence[int], vocabulary: Vocabulary) -> list[int]:
    """The raw window of a causally masked example without its EOS; raises ValueError where sentinels are amiss."""
    head, *parts = _at_sentinels(stream, vocabulary)
    text, spans = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    if len(text) != len(spans) or any(k != i for half in (text, spans) for i, (k, _) in enumerate(half)):
        raise ValueError(f"targets: sentinels {[k for k, _ in parts]}, expected 0, 1, ... twice")
    return head[1] + [token for (_, after), (_, span) in zip(text, spans, strict=True) for token in span + after]


def restore_blanks(given: Sequence[int], wanted: Sequence[int], vocabulary: Vocabulary) -> list[int]:
    """The raw window of Part A and Part B, both without their last EOS; raises ValueError where they do not match."""
    head, *text = _at_sentinels(given, vocabulary)
    before, *spans = _at_sentinels([*wanted, EOS_ID], vocabulary)
    found = {sentinel: span[:-1] for sentinel, span in spans}
    due = list(range(len(text)))
    if before[1] or [k for k, _ in text] != due or sorted(k for k, _ in spans) != due:
        raise ValueError(f"inputs have sentinels {[k for k, _ in text]}, targets {[k for k, _ in spans]}")
    return head[1] + [token for sentinel, after in text for token in found[sentinel] + after]


def _at_sentinels(stream: Sequence[int], vocabulary: Vocabulary) -> list[tuple[int, list[int]]]:
    """(-1, what stands before the first sentinel), then (sentinel's number, what follows it) for each."""
    parts: list[tuple[int, list[int]]] = [(-1, [])]
    for token in stream:
        if vocabulary.base_size <= token <= vocabulary.first_sentinel_id:
            parts.append((vocabulary.first_sentinel_id - token, []))
        else:
            parts[-1][1].append(token)
    return parts
