"""Entities of word labels and their F1, against seqeval's published definition."""

from __future__ import annotations

import random

import pytest

from t5x_like.evaluation.text_metrics import METRICS
from t5x_like.evaluation.word_labels import entities, entity_scores


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),  # The example of seqeval's get_entities.
        ("I-PER I-PER I-LOC", [("PER", 0, 2), ("LOC", 2, 3)]),  # IOB1: a change of type begins an entity.
        ("B-PER B-PER I-LOC", [("PER", 0, 1), ("PER", 1, 2), ("LOC", 2, 3)]),
        ("S-PER B-LOC I-LOC E-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 4), ("LOC", 4, 5)]),
        ("O O", []),
        ("", []),
    ],
)
def test_entities(labels: str, expected: list[tuple[str, int, int]]) -> None:
    assert entities(labels.split()) == expected


def test_the_f1_of_seqevals_own_example() -> None:
    """The example of seqeval's README: one of two entities is right."""
    true = ["O O O B-MISC I-MISC I-MISC O", "B-PER I-PER O"]
    predicted = ["O O B-MISC I-MISC I-MISC I-MISC O", "B-PER I-PER O"]
    scores = METRICS["entity_f1"](true, predicted)
    assert scores == {"precision": 50, "recall": 50, "f1": 50, "f1/MISC": 0, "f1/PER": 100}


@pytest.mark.external
def test_entity_f1_equals_seqeval() -> None:
    library = pytest.importorskip("seqeval.metrics")
    labels = ["O", *(f"{tag}-{kind}" for tag in "BIES" for kind in ("PER", "LOC"))]
    draw = random.Random(0)
    true, predicted = ([[draw.choice(labels) for _ in range(9)] for _ in range(50)] for _ in range(2))
    found = entity_scores(true, predicted)
    assert found["f1"] == pytest.approx(100 * library.f1_score(true, predicted))
    assert found["precision"] == pytest.approx(100 * library.precision_score(true, predicted))
    assert found["recall"] == pytest.approx(100 * library.recall_score(true, predicted))


def test_words_without_a_prediction_count_as_wrong() -> None:
    """A text that was truncated has fewer predictions than words."""
    assert METRICS["word_accuracy"](["A B C D"], ["A B"]) == {"word_accuracy": 50}
    assert METRICS["entity_f1"](["B-X O B-X"], ["B-X"])["recall"] == 50
