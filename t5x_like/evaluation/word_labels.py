"""Entities of word labels such as B-PER, I-PER and O, and their F1 as CoNLL's evaluation script counts it.

The rules follow conlleval and the default mode of seqeval: an entity begins at B or S, or where the type changes,
or after O or E; labels of the schemes IOB1, IOB2 and IOBES may be mixed, and no label sequence is invalid.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import NamedTuple


class Entity(NamedTuple):
    """Words [start, stop) with one type."""

    type: str
    start: int
    stop: int


def entities(labels: Sequence[str]) -> list[Entity]:
    """Return the entities of a sentence in order."""
    found: list[Entity] = []
    begin = 0
    previous_tag, previous_type = "O", ""
    for position, label in enumerate([*labels, "O"]):
        tag, kind = label[:1], label[1:].split("-", maxsplit=1)[-1] or "_"
        if _ends(previous_tag, tag, previous_type, kind):
            found.append(Entity(previous_type, begin, position))
        if _begins(previous_tag, tag, previous_type, kind):
            begin = position
        previous_tag, previous_type = tag, kind
    return found


def _ends(previous: str, tag: str, previous_type: str, kind: str) -> bool:
    """Return whether an entity ends between two words."""
    if previous in ("E", "S"):
        return True
    if previous in ("B", "I") and tag in ("B", "S", "O"):
        return True
    return previous not in ("O", ".") and previous_type != kind


def _begins(previous: str, tag: str, previous_type: str, kind: str) -> bool:
    """Return whether an entity begins between two words."""
    if tag in ("B", "S"):
        return True
    if previous in ("E", "S", "O") and tag in ("E", "I"):
        return True
    return tag not in ("O", ".") and previous_type != kind


def entity_scores(targets: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return precision, recall and F1 of all entities, and the F1 of each type, in per cent.

    A predicted entity is correct if type and words equal those of a true one. A sentence whose last words have no
    prediction, because it was truncated, has O there.

    Args:
      targets, predictions: The labels of the words of each sentence.
    """
    true: collections.Counter[str] = collections.Counter()
    predicted: collections.Counter[str] = collections.Counter()
    shared: collections.Counter[str] = collections.Counter()
    for target, prediction in zip(targets, predictions, strict=True):
        there, said = set(entities(target)), set(entities(prediction))
        true.update(entity.type for entity in there)
        predicted.update(entity.type for entity in said)
        shared.update(entity.type for entity in there & said)
    hits, num_predicted, num_true = shared.total(), predicted.total(), true.total()
    scores = {
        "precision": 100 * hits / max(num_predicted, 1),
        "recall": 100 * hits / max(num_true, 1),
        "f1": 200 * hits / max(num_predicted + num_true, 1),
    }
    for kind in sorted(true | predicted):
        scores[f"f1/{kind}"] = 200 * shared[kind] / max(predicted[kind] + true[kind], 1)
    return scores
