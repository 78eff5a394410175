"""Bounds of configuration fields: their messages, and reading from JSON."""

from __future__ import annotations

import math
from typing import Annotated

import pydantic
import pytest
from helpers.config_examples import changed, example

from t5x_like.config.bounds import (
    NonEmptyStr,
    OpenUnitFloat,
    PositiveFloat,
    PositiveInt,
    Seed,
    bound_problems,
)
from t5x_like.config.dataclass import config_dataclass
from t5x_like.config.serialization import from_json, to_json


@config_dataclass
class Inner:
    rate: OpenUnitFloat = 0.5


@config_dataclass
class Outer:
    size: PositiveInt = 1
    scale: PositiveFloat | None = None
    seed: Seed = 0
    name: NonEmptyStr = "x"
    lengths: Annotated[tuple[PositiveInt, ...], pydantic.Field(min_length=1)] = (1,)
    inner: Inner | None = None
    several: tuple[Inner, ...] = ()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Outer(size=0), ["size: found 0, expected 1 or more"]),
        (Outer(scale=0.0), ["scale: found 0, expected a number above 0"]),
        (Outer(scale=math.inf), ["scale: found inf, expected a number above 0"]),
        (Outer(scale=math.nan), ["scale: found nan, expected a number above 0"]),
        (Outer(seed=-1), ["seed: found -1, expected a number in [0, 4294967295]"]),
        (Outer(name=""), ["name: found nothing, expected a value that is not empty"]),
        (Outer(lengths=()), ["lengths: found nothing, expected at least one entry"]),
        (Outer(inner=Inner(rate=1.0)), ["inner.rate: found 1, expected a number in (0, 1)"]),
        (Outer(several=(Inner(), Inner(rate=math.nan))), ["several.1.rate: found nan, expected a number in (0, 1)"]),
        (Outer(size=0, seed=-1), ["size: found 0", "seed: found -1"]),
        (Outer(), []),
    ],
)
def test_message_states_path_value_and_bounds(value: Outer, expected: list[str]) -> None:
    messages = [str(problem) for problem in bound_problems(value)]
    assert len(messages) == len(expected)
    assert all(message.startswith(start) for message, start in zip(messages, expected, strict=True))


def test_bounds_of_tuple_items_have_the_index_in_the_path() -> None:
    assert [problem.where for problem in bound_problems(Outer(lengths=(1, 0, -1)))] == ["lengths.1", "lengths.2"]


def test_reading_json_checks_types_but_not_bounds() -> None:
    """Bounds are checked by `validate`, which reports them together with all other problems."""
    run = changed(changed(example(), "training.num_train_steps", 0), "training.schedule.learning_rate", math.inf)
    assert from_json(to_json(run), source="test") == run
