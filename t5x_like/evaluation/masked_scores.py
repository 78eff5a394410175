"""Scores of texts by a model that predicts masked tokens and has no exact likelihood.

pseudo_likelihood (Salazar et al. 2020) is the sum over the scored tokens of log p(token | all others), the token being
masked. diffusion_bound estimates a lower bound of their log-likelihood (`config.objectives.masked_diffusion`): of n
scored tokens, k are masked, and their log-probabilities have the weight n / k. The values of k are the middles of equal
parts of 1..n, and the masks are a function of n only, so that texts of the same length have the same ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, assert_never, get_args

import numpy as np

from t5x_like.data.objectives.masked_diffusion import random_masks
from t5x_like.data.stream import rng
from t5x_like.decoding.inference_params import InferenceParams
from t5x_like.decoding.log_likelihood import MaskedRow, score_masked_tokens
from t5x_like.decoding.masked_prompts import only_unmasks
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.model_loading import LoadedModel
from t5x_like.program import Program
from t5x_like.utils.type_aliases import PyTree

Scoring = Literal["log_likelihood", "pseudo_likelihood", "diffusion_bound"]
_BOUND_GRID = 8
_MASKS = 0x3A5C
"""Constant in place of a seed: every model is scored with the same masks."""
_ROWS_AT_ONCE = 4096
"""Rows that exist at the same time: a text of n tokens is n rows of n tokens each."""


class ScoredText(NamedTuple):
    """Text some of whose tokens are scored, given the others.

    Attributes:
      tokens: Ids of the text, with special tokens.
      start: Position of the first scored token.
      length: Number of scored tokens, which follow each other.
    """

    tokens: Sequence[int]
    start: int
    length: int


class MaskedScore(NamedTuple):
    """Score of one text.

    Attributes:
      sum: Score in nats.
      is_greedy: Each masked token is the most likely one in each of the rows that the score is made of.
    """

    sum: float
    is_greedy: bool


def default_scoring(loaded: LoadedModel) -> Scoring:
    """Return how a model scores a text by default: exactly where it predicts the next token, and otherwise by the
    bound if masked diffusion was trained."""
    if not only_unmasks(loaded):
        return "log_likelihood"
    trained = () if loaded.trained_on is None else loaded.trained_on.objectives
    return "diffusion_bound" if any(one.kind == "masked_diffusion" for one in trained) else "pseudo_likelihood"


def require_scoring(loaded: LoadedModel, scoring: Scoring, option: str) -> None:
    """Raise ConfigError if the model cannot score texts in this way. `option` is named in the message."""
    if scoring not in get_args(Scoring):
        raise ConfigError([ConfigProblem(option, repr(scoring), f"one of {', '.join(get_args(Scoring))}")])
    if loaded.model.task_head is not None:
        raise ConfigError([ConfigProblem(str(loaded.path), "a task head", "a head over the vocabulary")])
    if only_unmasks(loaded) and loaded.model.architecture == "encoder_decoder":
        expected = "a model that predicts the next token, or masked tokens of a whole text"
        fix = "held-out text is scored by `eval` and its --continuation"
        raise ConfigError([ConfigProblem(str(loaded.path), "an encoder-decoder of block diffusion", expected, fix)])
    if (scoring == "log_likelihood") == only_unmasks(loaded):
        kind = "an encoder" if loaded.model.decoder is None else "a decoder"
        expected = (
            "log_likelihood for a model that predicts the next token, pseudo_likelihood or diffusion_bound for one "
            "that predicts masked tokens only"
        )
        raise ConfigError([ConfigProblem(option, f"{scoring} with {kind}", expected)])


def score_texts(
    program: Program, params: PyTree | InferenceParams, texts: Iterable[ScoredText], mask_id: int, scoring: Scoring
) -> list[MaskedScore]:
    """Return the pseudo-likelihood or the diffusion bound of each text. A text without scored tokens has the score 0.

    Raises:
      ConfigError: a text has more tokens than the model has learned positions, or the model predicts no masked tokens.
    """
    counts: list[int] = []

    def prepared() -> Iterator[tuple[MaskedRow, float]]:
        for text in texts:
            masked = _masked_rows(text, mask_id, scoring)
            counts.append(len(masked))
            yield from masked

    sums: list[float] = []
    greedy: list[bool] = []
    remaining = prepared()
    while part := list(itertools.islice(remaining, _ROWS_AT_ONCE)):
        scores = score_masked_tokens(program, params, [row for row, _ in part])
        sums += [weight * score.sum for score, (_, weight) in zip(scores, part, strict=True)]
        greedy += [score.is_greedy for score in scores]
    ends = np.cumsum(counts).tolist()
    return [
        MaskedScore(float(np.sum(sums[end - count : end])), all(greedy[end - count : end]))
        for end, count in zip(ends, counts, strict=True)
    ]


def _masked_rows(text: ScoredText, mask_id: int, scoring: Scoring) -> list[tuple[MaskedRow, float]]:
    """Return rows with masked tokens of the text, and the weight of the log-probabilities of each row."""
    count = text.length
    if not count:
        return []
    match scoring:
        case "pseudo_likelihood":
            masks = np.eye(count, dtype=np.bool_)
            weights = np.ones(count)
        case "diffusion_bound":
            # A text of fewer tokens has some of the numbers several times.
            counts = ((np.arange(_BOUND_GRID) + 0.5) / _BOUND_GRID * count).astype(np.int64) + 1
            masks = random_masks(rng.fold_in(rng.fold_in(_MASKS, count), np.arange(_BOUND_GRID)), counts, count)
            weights = count / counts / _BOUND_GRID
        case "log_likelihood":
            raise ValueError("found log_likelihood, expected a score of masked tokens")
        case unknown:
            assert_never(unknown)
    made = []
    for mask, weight in zip(masks, weights.tolist(), strict=True):
        positions = (np.flatnonzero(mask) + text.start).tolist()
        tokens = list(text.tokens)
        for position in positions:
            tokens[position] = mask_id
        made.append((MaskedRow(tokens, positions, [text.tokens[position] for position in positions]), weight))
    return made
