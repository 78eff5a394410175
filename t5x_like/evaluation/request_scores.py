"""Scores of continuations after contexts, by the exact likelihood of a model or by what stands in for it."""

from __future__ import annotations

from collections.abc import Sequence

from t5x_like.decoding.inference_params import InferenceParams
from t5x_like.decoding.log_likelihood import score_tokens
from t5x_like.decoding.masked_prompts import mask_id, special_tokens
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.evaluation.lm_requests import Pair, RequestFormat, masked_request_format, request_format
from t5x_like.evaluation.masked_scores import ScoredText, Scoring, score_texts
from t5x_like.model_loading import LoadedModel
from t5x_like.utils.type_aliases import PyTree


def format_of_requests(
    loaded: LoadedModel, scoring: Scoring, *, mode: str | None = None, max_length: int | None = None
) -> RequestFormat:
    """Return the layout of requests that are scored in this way; see `request_format` for the arguments."""
    if scoring == "log_likelihood":
        return request_format(loaded, mode=mode, max_length=max_length)
    if mode is not None:
        raise ConfigError([ConfigProblem("mode", mode, "none for a model that predicts masked tokens only")])
    return masked_request_format(loaded, max_length=max_length)


def request_scores(
    loaded: LoadedModel,
    params: PyTree | InferenceParams,
    layout: RequestFormat,
    pairs: Sequence[Pair],
    scoring: Scoring,
) -> list[tuple[float, bool]]:
    """Return the score of each pair's targets after its inputs in nats, and True if they are the most likely tokens.

    Args:
      loaded: The model.
      params: Its parameters.
      layout: Result of `format_of_requests`, which has made the pairs.
      pairs: Inputs and targets.
      scoring: Kind of the score.
    """
    if scoring == "log_likelihood":
        scores = score_tokens(loaded.program, params, pairs, bidirectional=layout.form.bidirectional)
        return [layout.log_likelihood(score) for score in scores]
    before, after = special_tokens(loaded)
    texts = [
        ScoredText([*before, *inputs, *targets, *after], len(before) + len(inputs), len(targets))
        for inputs, targets in pairs
    ]
    found = score_texts(loaded.program, params, texts, mask_id(loaded), scoring)
    return [(score.sum, score.is_greedy) for score in found]
