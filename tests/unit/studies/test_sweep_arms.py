"""Arms of a sweep: which words are values of a field and which are several values of a swept one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from helpers.config_examples import example

from t5x_like.config import RunConfig
from t5x_like.config.overrides import apply_overrides
from t5x_like.errors import ConfigError
from t5x_like.studies.study import Arm
from t5x_like.studies.sweep_arms import sweep_arms

RATE = "--training.schedule.learning-rate"


def arms(*words: str) -> list[Arm]:
    run = example()

    def configure(overrides: Sequence[str]) -> RunConfig:
        return apply_overrides(run, overrides)

    return list(sweep_arms(run, "smoke", words, configure))


def test_arms_are_the_product_of_the_values() -> None:
    found = arms(RATE, "0.003", "1e-2", "--training.seed=4", "--data.seed", "0", "1", "2")
    assert [(arm.run.training.schedule.learning_rate, arm.run.data.seed) for arm in found] == [
        (rate, seed) for rate in (0.003, 0.01) for seed in (0, 1, 2)
    ]
    assert {arm.run.training.seed for arm in found} == {4}
    assert [arm.name for arm in found[:2]] == ["learning-rate_0.003-seed_0", "learning-rate_0.003-seed_1"]
    assert [arm.run.name for arm in found] == [arm.name for arm in found]
    # The overrides alone give the same configuration, as `train` reads them.
    assert all(apply_overrides(example(), [*arm.recipe[1:], "--name", arm.name]) == arm.run for arm in found)
    assert {arm.recipe[0] for arm in found} == {"smoke"}


def test_words_that_are_one_value_belong_to_every_arm() -> None:
    found = arms("--data.corpus.files", "a.txt", "b.txt", "--model.dtype", "float32", "bfloat16")
    assert [arm.run.model.dtype for arm in found] == ["float32", "bfloat16"]
    assert {arm.run.data.corpus.files for arm in found} == {("a.txt", "b.txt")}


def test_fields_of_the_same_name_are_named_by_their_paths() -> None:
    first, *_ = arms("--data.seed", "0", "1", "--training.seed", "2", "3")
    assert first.name == "data.seed_0-training.seed_2"


def test_values_that_differ_in_other_letters_have_different_names() -> None:
    """The names of directories have few letters; a value without others keeps its name."""
    found = arms("--data.store-dir", "a/b", "a b", "a_b")
    assert found[2].name == "store-dir_a_b"
    assert len({arm.name for arm in found}) == 3 and all(arm.name.startswith("store-dir_a_b") for arm in found)
    assert arms("--data.store-dir", "a/b", "c")[0].name == found[0].name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "found no field with several values"),
        ([RATE, "0.1"], "found no field with several values"),
        ([RATE, "0.1", "0.2", "0.1"], "0.1 more than once"),
        (["0.1", RATE], "a word that belongs to no option"),
        ([RATE, "0.1", "fast"], "'fast', expected a number"),
        (["--training.schedule.learning-rat", "0.1", "0.2"], "perhaps --training.schedule.learning-rate"),
    ],
)
def test_errors_say_what_was_found_and_expected(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        arms(*words)
