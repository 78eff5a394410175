"""Minimal pairs: `t5x-like eval MODEL --pairs FILE`, the share of pairs whose good text is the more likely one.

Each line of the file has two texts that differ in what is tested, `good` and `bad` (as in BLiMP, Warstadt et al. 2020).
A model that predicts the next token scores a text by its exact log-likelihood; one that predicts masked tokens has none
and scores it as `masked_scores` describes.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5x_like.decoding.log_likelihood import score_tokens
from t5x_like.decoding.masked_prompts import mask_id
from t5x_like.errors import DataError
from t5x_like.evaluation import bootstrap
from t5x_like.evaluation.lm_requests import Pair, request_format
from t5x_like.evaluation.masked_scores import ScoredText, Scoring, default_scoring, require_scoring, score_texts
from t5x_like.evaluation.score_predictions import json_lines
from t5x_like.model_loading import LoadedModel
from t5x_like.text_inputs.encoding import LONGEST, encode_function, max_positions

GOOD, BAD = "good", "bad"


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
    scoring = scoring or default_scoring(loaded)
    texts = [text for pair in pairs for text in (pair.good, pair.bad)]
    where = [pair.where for pair in pairs for _ in range(2)]
    require_scoring(loaded, scoring, "--pairs-score")
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
    tokenizer, mask = loaded.tokenizer, mask_id(loaded)
    longest = LONGEST if loaded.trained_on is None else loaded.trained_on.row_length
    longest = min(longest, max_positions(loaded.model) or longest)
    bodies = [tokenizer.encode(text) for text in texts]
    encode = encode_function(loaded)
    # The start token of a decoder is not part of the text that is masked.
    skipped = int(loaded.model.decoder is not None)
    num_special = len(encode([""], longest)[0]) - skipped
    for place, body in zip(where, bodies, strict=True):
        _require_length(place, len(body) + num_special, longest)
    rows = [row[skipped:] for row in encode(texts, longest + skipped)]
    scored = [
        ScoredText(row, _start_of(body, row, place), len(body))
        for body, row, place in zip(bodies, rows, where, strict=True)
    ]
    found, params = loaded.params(step)
    return found, [score.sum for score in score_texts(loaded.program, params, scored, mask, scoring)]


def _start_of(body: Sequence[int], row: Sequence[int], where: str) -> int:
    """Return the position of the text's tokens in its row."""
    for start in range(len(row) - len(body) + 1):
        if list(row[start : start + len(body)]) == list(body):
            return start
    raise DataError(f"{where}: found other tokens with special tokens than without, expected the same ones")


def _require_length(where: str, found: int, longest: int) -> None:
    if found > longest:
        raise DataError(f"{where}: found a text of {found} tokens, expected at most {longest}, the row of this model")
