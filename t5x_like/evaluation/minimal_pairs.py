"""Minimal pairs: `t5x-like eval MODEL --pairs FILE`, the share of pairs whose good text is the more likely one.

Each line of the file has two texts that differ in what is tested, `good` and `bad` (as in BLiMP, Warstadt et al. 2020).
A model with a decoder scores a text by its exact log-likelihood. An encoder has none and scores it by pseudo-likelihood
(Salazar et al. 2020): the sum over the tokens of log p(token | all others), the token being masked; or by the bound of
masked diffusion at fixed numbers of masked tokens and fixed masks, which are the same for texts of the same length.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from t5x_like.config import ModelConfig
from t5x_like.data.objectives.masked_diffusion import random_masks
from t5x_like.data.stream import rng
from t5x_like.decoding.log_likelihood import MaskedRow, score_masked_tokens, score_tokens
from t5x_like.errors import ConfigError, ConfigProblem, DataError
from t5x_like.evaluation import bootstrap
from t5x_like.evaluation.lm_requests import Pair, request_format
from t5x_like.evaluation.score_predictions import json_lines
from t5x_like.model_loading import LoadedModel
from t5x_like.text_inputs.encoding import LONGEST, encode_function, max_positions

Scoring = Literal["log_likelihood", "pseudo_likelihood", "diffusion_bound"]
GOOD, BAD = "good", "bad"
_BOUND_GRID = 8
_MASKS = 0x3A5C
"""Constant in place of a seed: every model is scored with the same masks."""
_ROWS_AT_ONCE = 4096
"""Rows of an encoder that exist at the same time: a text of n tokens is n rows of n tokens each."""


@dataclasses.dataclass(frozen=True)
class TextPair:
    """Two texts, of which the first should be the more likely one.

    Attributes:
      where: File and line, for messages.
    """

    good: str
    bad: str
    where: str


def read_pairs(path: Path) -> list[TextPair]:
    """Return the pairs of a file of JSON lines.

    Raises:
      DataError: the file cannot be read or is empty, or a line lacks a text, has a blank one or the same text twice.
    """
    pairs = []
    for where, fields in json_lines(path, f"{GOOD!r} and {BAD!r}"):
        for name in (GOOD, BAD):
            value = fields.get(name)
            if not isinstance(value, str) or not value.strip():
                found = f"{value!r}" if name in fields else f"no field {name!r} among {', '.join(fields) or 'none'}"
                raise DataError(f"{where}: found {found}, expected a text in each of {GOOD!r} and {BAD!r}")
        if fields[GOOD] == fields[BAD]:
            raise DataError(f"{where}: found the same text in {GOOD!r} and {BAD!r}, expected two texts that differ")
        pairs.append(TextPair(fields[GOOD], fields[BAD], where))
    return pairs


def default_scoring(model: ModelConfig) -> Scoring:
    """Return how a model scores a text by default."""
    return "pseudo_likelihood" if model.decoder is None else "log_likelihood"


def score_pairs(
    loaded: LoadedModel,
    path: Path,
    *,
    step: int | None = None,
    scoring: Scoring | None = None,
    draws: int = bootstrap.DRAWS,
) -> dict[str, Any]:
    """Return the accuracy of a model on the pairs of a file.

    Args:
      loaded: A model of any architecture with a head over the vocabulary.
      path: File of JSON lines.
      step: Step of the model; None: the newest.
      scoring: How texts are scored; None: `default_scoring`.
      draws: Number of bootstrap draws; 0: no interval.

    Returns:
      model, step, file, `digest` of the pairs, scoring, num_pairs, accuracy (a fraction; equal scores count as wrong),
      interval (95 %, over the pairs) or None, mean_difference (score of the good text minus that of the bad one, nats),
      and `scores`: [good, bad] of each pair in nats.

    Raises:
      UserError: the file or the model cannot be used, or a text is too long for the model.
    """
    pairs = read_pairs(path)
    scoring = scoring or default_scoring(loaded.model)
    texts = [text for pair in pairs for text in (pair.good, pair.bad)]
    where = [pair.where for pair in pairs for _ in range(2)]
    if loaded.model.task_head is not None:
        raise ConfigError([ConfigProblem(str(loaded.path), "a task head", "a head over the vocabulary")])
    if (scoring == "log_likelihood") != (loaded.model.decoder is not None):
        found = f"{scoring} with {'an encoder' if loaded.model.decoder is None else 'a decoder'}"
        expected = "log_likelihood for a model with a decoder, pseudo_likelihood or diffusion_bound for an encoder"
        raise ConfigError([ConfigProblem("--pairs-score", found, expected)])
    for place, text in zip(where, texts, strict=True):
        # Its score would be 0, more than that of any other text.
        if not loaded.tokenizer.encode(text):
            raise DataError(f"{place}: found {text!r}, which has no tokens, expected a text with at least one")
    values = (
        _log_likelihoods(loaded, texts, where, step)
        if scoring == "log_likelihood"
        else _masked_scores(loaded, texts, where, step, scoring)
    )
    found_step, scores = values
    scores_Px2 = np.array(scores, np.float64).reshape(-1, 2)
    right = (scores_Px2[:, 0] > scores_Px2[:, 1]).astype(np.float64)
    drawn = bootstrap.ratio_draws(right, np.ones(len(right)), count=draws)
    return {
        "model": str(loaded.path),
        "step": found_step,
        "file": str(path),
        "digest": hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16],
        "scoring": scoring,
        "num_pairs": len(pairs),
        "accuracy": float(right.mean()),
        "interval": bootstrap.interval(drawn),
        "mean_difference": float((scores_Px2[:, 0] - scores_Px2[:, 1]).mean()),
        "scores": scores_Px2.tolist(),
    }


def _log_likelihoods(
    loaded: LoadedModel, texts: Sequence[str], where: Sequence[str], step: int | None
) -> tuple[int, list[float]]:
    """Return the log-likelihood of each text after an empty context, laid out as lm-eval's requests."""
    form = request_format(loaded)
    requests: list[Pair] = [form.pair("", text) for text in texts]
    for place, (inputs, targets) in zip(where, requests, strict=True):
        longest = form.targets_length if form.form.ends_in_eos else form.inputs_length - len(inputs)
        _require_length(place, len(targets), longest)
    found, params = loaded.params(step)
    scores = score_tokens(loaded.program, params, requests, bidirectional=form.form.bidirectional)
    return found, [form.log_likelihood(score)[0] for score in scores]


def _masked_scores(
    loaded: LoadedModel, texts: Sequence[str], where: Sequence[str], step: int | None, scoring: Scoring
) -> tuple[int, list[float]]:
    """Return the pseudo-likelihood or the diffusion bound of each text, with the special tokens of the model around."""
    tokenizer = loaded.tokenizer
    try:
        mask_id = tokenizer.vocabulary.mask_id
    except IndexError:
        raise ConfigError(
            [ConfigProblem(str(loaded.path), "a tokenizer without a mask token", "one with a mask token or sentinels")]
        ) from None
    longest = LONGEST if loaded.trained_on is None else loaded.trained_on.inputs_length
    longest = min(longest, max_positions(loaded.model) or longest)
    bodies = [tokenizer.encode(text) for text in texts]
    encode = encode_function(loaded)
    num_special = len(encode([""], longest)[0])
    for place, body in zip(where, bodies, strict=True):
        _require_length(place, len(body) + num_special, longest)
    rows = encode(texts, longest)
    starts = [_start_of(body, row, place) for body, row, place in zip(bodies, rows, where, strict=True)]
    counts: list[int] = []

    def prepared() -> Iterator[tuple[MaskedRow, float]]:
        for body, row, start in zip(bodies, rows, starts, strict=True):
            masked = _masked_rows(row, start, len(body), mask_id, scoring)
            counts.append(len(masked))
            yield from masked

    found, params = loaded.params(step)
    sums: list[float] = []
    remaining = prepared()
    while part := list(itertools.islice(remaining, _ROWS_AT_ONCE)):
        scores = score_masked_tokens(loaded.program, params, [row for row, _ in part])
        sums += [weight * float(np.sum(score)) for score, (_, weight) in zip(scores, part, strict=True)]
    ends = np.cumsum(counts)
    return found, [float(np.sum(sums[end - count : end])) for end, count in zip(ends, counts, strict=True)]


def _masked_rows(
    row: list[int], start: int, count: int, mask_id: int, scoring: Scoring
) -> list[tuple[MaskedRow, float]]:
    """Return rows with masked tokens of the text, and the weight of the log-probabilities of each row."""
    if scoring == "pseudo_likelihood":
        masks = np.eye(count, dtype=np.bool_)
        weights = np.ones(count)
    else:
        # The middles of equal parts of 1..n. A text of fewer tokens has some of the numbers several times.
        counts = ((np.arange(_BOUND_GRID) + 0.5) / _BOUND_GRID * count).astype(np.int64) + 1
        masks = random_masks(rng.fold_in(rng.fold_in(_MASKS, count), np.arange(_BOUND_GRID)), counts, count)
        weights = count / counts / _BOUND_GRID
    made = []
    for mask, weight in zip(masks, weights.tolist(), strict=True):
        positions = (np.flatnonzero(mask) + start).tolist()
        tokens = list(row)
        for position in positions:
            tokens[position] = mask_id
        made.append((MaskedRow(tokens, positions, [row[position] for position in positions]), weight))
    return made


def _start_of(body: Sequence[int], row: Sequence[int], where: str) -> int:
    """Return the position of the text's tokens in its row."""
    for start in range(len(row) - len(body) + 1):
        if list(row[start : start + len(body)]) == list(body):
            return start
    raise DataError(f"{where}: found other tokens with special tokens than without, expected the same ones")


def _require_length(where: str, found: int, longest: int) -> None:
    if found > longest:
        raise DataError(f"{where}: found a text of {found} tokens, expected at most {longest}, the row of this model")
