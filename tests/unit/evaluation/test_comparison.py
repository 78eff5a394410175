"""Two models are compared only on the same text."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t5x_like.evaluation.comparison import EvaluatedCheckpoint, compare

IDENTITY = {"fingerprint": "a", "tokenizer": "t", "documents": 10, "bytes": 1234}


def evaluated(identity: dict[str, Any], digests: list[str], value: float) -> EvaluatedCheckpoint:
    draws = np.linspace(value - 0.01, value + 0.01, 100)
    return EvaluatedCheckpoint(
        name="a",
        path=Path("a"),
        step=1,
        config={},
        values={"bits_per_byte": value, "loss/R": value, "squad/em": value},
        draws={"bits_per_byte": draws},
        examples={"bits_per_byte": digests},
        held_out=[identity],
        samples=[],
        answers={"squad": []},
    )


@pytest.mark.parametrize(
    ("other", "digests", "same"),
    [
        (IDENTITY, ["x", "y", "z"], True),  # More batches of the same store.
        (IDENTITY | {"fingerprint": "b", "tokenizer": "u"}, ["z"], True),  # The same text with another tokenizer.
        (IDENTITY | {"fingerprint": "b"}, ["x", "y"], True),  # Another store with the same rows.
        (IDENTITY | {"fingerprint": "b"}, ["z"], False),
        (IDENTITY | {"fingerprint": "b", "tokenizer": "u", "bytes": 1235}, ["z"], False),
    ],
)
def test_scores_of_different_texts_are_not_subtracted(other: dict[str, Any], digests: list[str], same: bool) -> None:
    first, second = evaluated(IDENTITY, ["x", "y"], 2.0), evaluated(other, digests, 1.0)
    rows = {row.name: row.cells[1] for row in compare([first, second])}
    cell = rows["bits_per_byte"]
    assert (cell.difference, cell.other_text) == ((-1.0, False) if same else (None, True))
    # Without the same examples there is no verdict.
    assert rows["bits_per_byte"].verdict == ("better" if digests == ["x", "y"] else "")
    assert rows["squad/em"].difference == -1.0
    unknown = dataclasses.replace(second, held_out=[])
    assert {row.name: row.cells[1] for row in compare([first, unknown])}["loss/R"].difference is None


@pytest.mark.parametrize(
    ("first_is_bound", "other_is_bound", "other_value", "verdict"),
    [
        (False, False, 1.0, "better"),
        (False, False, 3.0, "worse"),
        # A bound below an exact value is a verdict; one above it leaves open where the exact value is.
        (False, True, 1.0, "better"),
        (False, True, 3.0, ""),
        (True, False, 1.0, ""),
        (True, False, 3.0, "worse"),
    ],
)
def test_an_upper_bound_has_a_verdict_only_where_the_exact_value_must_have_it(
    first_is_bound: bool, other_is_bound: bool, other_value: float, verdict: str
) -> None:
    def one(value: float, is_bound: bool) -> EvaluatedCheckpoint:
        bounds = frozenset(["bits_per_byte"] if is_bound else [])
        return dataclasses.replace(evaluated(IDENTITY, ["x"], value), bounds=bounds)

    found = compare([one(2.0, first_is_bound), one(other_value, other_is_bound)])
    (cell,) = [row.cells[1] for row in found if row.name == "bits_per_byte"]
    assert cell.verdict == verdict and cell.paired
