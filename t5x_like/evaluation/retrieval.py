"""Retrieval from a context by depth and length: `t5x-like eval MODEL --retrieval LENGTHS`.

A context is made of plain sentences, with four statements "The code of NAME is NUMBER." among them. It ends in the
question for one of them, and a model answers correctly if of the four numbers the right one has the highest score. All
four occur in the context, so that a model that only repeats a number is right in a quarter of the cases. The depth is
the position of the statement that is asked for: 0 at the beginning of the context, 1 directly before the question. The
contexts are a function of the length, the depth and the number of the example: the same text for every model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like.errors import DataError
from t5x_like.evaluation import bootstrap
from t5x_like.evaluation.masked_scores import Scoring, default_scoring, require_scoring
from t5x_like.evaluation.request_scores import format_of_requests, request_scores
from t5x_like.model_loading import LoadedModel

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NUM_EXAMPLES = 20
"""Examples of each length and depth."""
NUM_CANDIDATES = 4
_NAMES = ("Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Henry", "Irene", "Jonas", "Karla", "Lukas")
_SUBJECTS = ("The teacher", "A neighbour", "The old man", "My sister", "The farmer", "A student", "The captain")
_VERBS = ("watched", "painted", "forgot", "found", "carried", "described", "repaired", "sold")
_OBJECTS = ("the red boat", "a small house", "the garden", "a letter", "the long road", "a wooden table", "the bridge")


@dataclasses.dataclass(frozen=True)
class RetrievalExample:
    """A context with its question.

    Attributes:
      context: The text, whose last sentence is the question without its answer.
      answers: The candidates, the right one first.
    """

    context: str
    answers: tuple[str, ...]


def retrieval_example(length: int, depth: float, number: int) -> RetrievalExample:
    """Return an example whose context has at most `length` characters, or the fewest that it can have."""
    draw = random.Random(f"{length} {depth} {number}")
    names = draw.sample(_NAMES, NUM_CANDIDATES)
    values = [str(value) for value in draw.sample(range(1000, 10000), NUM_CANDIDATES)]
    asked, *others = (f"The code of {name} is {value}." for name, value in zip(names, values, strict=True))
    question = f"The code of {names[0]} is"
    free = length - len(question) - sum(len(sentence) + 1 for sentence in (asked, *others))
    sentences: list[str] = []
    while True:
        sentence = f"{draw.choice(_SUBJECTS)} {draw.choice(_VERBS)} {draw.choice(_OBJECTS)}."
        free -= len(sentence) + 1
        if free < 0:
            break
        sentences.append(sentence)
    for other in others:
        sentences.insert(draw.randint(0, len(sentences)), other)
    sentences.insert(round(depth * len(sentences)), asked)
    return RetrievalExample(" ".join([*sentences, question]), tuple(f" {value}." for value in values))


def score_retrieval(
    loaded: LoadedModel,
    lengths: Sequence[int],
    *,
    step: int | None = None,
    scoring: Scoring | None = None,
    num_examples: int = NUM_EXAMPLES,
    draws: int = bootstrap.DRAWS,
) -> dict[str, Any]:
    """Return the accuracy of a model for each length and depth.

    Args:
      loaded: A model of any architecture with a head over the vocabulary.
      lengths: Lengths of the contexts in characters.
      step: Step of the model; None: the newest.
      scoring: How answers are scored; None: `default_scoring`.
      num_examples: Examples of each length and depth.
      draws: Number of bootstrap draws; 0: no intervals.

    Returns:
      model, step, scoring, `digest` of the texts, num_examples, chance, and `cells`: length, depth, accuracy, interval
      (95 %, over the examples) or None.

    Raises:
      UserError: the model cannot be used, or a context is too long for it.
    """
    scoring = scoring or default_scoring(loaded)
    require_scoring(loaded, scoring, "--retrieval")
    layout = format_of_requests(loaded, scoring)
    cells = [*itertools.product(lengths, DEPTHS)]
    examples = [retrieval_example(*cell, number) for cell in cells for number in range(num_examples)]
    pairs = []
    for example in examples:
        # A context that is too long would lose its beginning without a word.
        count, most = len(layout.tokenizer.encode(example.context)), layout.longest_context
        for answer in example.answers:
            inputs, targets = layout.pair(example.context, answer)
            longest = most - (0 if layout.form.ends_in_eos else len(targets))
            if count > longest:
                raise DataError(
                    f"--retrieval: found a context of {len(example.context)} characters with {count} tokens, expected "
                    f"at most {longest}, which {loaded.path} reads; name smaller lengths"
                )
            pairs.append((inputs, targets))
    found, params = loaded.params(step)
    scores = np.array([score for score, _ in request_scores(loaded, params, layout, pairs, scoring)], np.float64)
    scores_CxExA = scores.reshape(len(cells), num_examples, NUM_CANDIDATES)
    # Equal scores count as wrong.
    is_right_CxE: npt.NDArray[np.bool_] = np.all(scores_CxExA[..., :1] > scores_CxExA[..., 1:], axis=-1)
    texts = [text for example in examples for text in (example.context, *example.answers)]
    return {
        "model": str(loaded.path),
        "step": found,
        "scoring": scoring,
        "digest": hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16],
        "num_examples": num_examples,
        "chance": 1 / NUM_CANDIDATES,
        "cells": [
            {
                "length": length,
                "depth": depth,
                "accuracy": float(right_E.mean()),
                "interval": bootstrap.interval(bootstrap.ratio_draws(right_E, np.ones(num_examples), count=draws)),
            }
            for (length, depth), right_E in zip(cells, is_right_CxE.astype(np.float64), strict=True)
        ],
    }
