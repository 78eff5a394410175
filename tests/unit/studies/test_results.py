"""Differences of arms and verdicts on synthetic results: no effect where there is none, and one where it is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from t5x_like.errors import ConfigError
from t5x_like.evaluation import bootstrap
from t5x_like.evaluation.comparison import EvaluatedCheckpoint
from t5x_like.evaluation.results_store import CONTINUATION, record
from t5x_like.studies.derived_scores import summaries_of, with_steps
from t5x_like.studies.results import Results, differs, ordered_arms, verdict
from t5x_like.studies.study import Prediction, StepsTo, Summary

BITS = "continuation_bits_per_byte"
WINDOWS, DRAWS = 200, 300
SEED_DEVIATION, WINDOW_DEVIATION = 0.01, 0.3
_INDICES = np.stack([*bootstrap.draws(WINDOWS, DRAWS)])


def checkpoint(windows_N: np.ndarray, *, digest: str = "same", is_bound: bool = False) -> EvaluatedCheckpoint:
    return EvaluatedCheckpoint(
        name="run",
        path=Path("run"),
        step=1,
        config={},
        values={BITS: float(windows_N.mean())},
        draws={BITS: windows_N[_INDICES].mean(axis=1)},
        examples={BITS: digest},
        held_out=[],
        samples=(),
        answers={},
        bounds=frozenset([BITS] if is_bound else []),
    )


def results(effects: Mapping[str, float], seeds: int, repetition: int = 0) -> Results:
    """Return runs whose windows are of the same difficulty for all, and whose seeds deviate from their arm."""
    rng = np.random.default_rng(repetition)
    text = 2.0 + rng.normal(0, WINDOW_DEVIATION, WINDOWS)
    runs = {}
    for arm, effect in effects.items():
        for seed in range(seeds):
            deviation = rng.normal(0, SEED_DEVIATION)
            runs[arm, seed] = checkpoint(text + effect + deviation + rng.normal(0, 0.02, WINDOWS))
    return Results(runs, BITS)


BETTER = Prediction("b is better than a", "a guess", "b", "a", high=0.0)


@pytest.mark.parametrize("seeds", [3, 5])
def test_an_arm_against_itself_is_undecided(seeds: int) -> None:
    """At most 2 of 20 repetitions are decided, where 95 % intervals have one on average; here of five times as many."""
    found = [
        verdict(BETTER, results({"a": 0.0, "b": 0.0}, seeds, repetition).compared("b", "a"))
        for repetition in range(100)
    ]
    assert found.count("undecided") >= 90
    assert seeds > 3 or found[:20].count("undecided") >= 18


def test_swapped_labels_have_no_effect() -> None:
    """With the labels of the arms swapped for every other seed, a prediction that was held becomes undecided."""
    before = results({"a": 0.0, "b": -0.06}, 4)
    assert verdict(BETTER, before.compared("b", "a")) == "held"
    other = {"a": "b", "b": "a"}
    swapped = {(other[arm] if seed and seed % 2 else arm, seed): run for (arm, seed), run in before.runs.items()}
    estimate = Results(swapped, BITS).compared("b", "a")
    assert verdict(BETTER, estimate) == "undecided" and not differs(estimate)


def test_predictions_are_held_failed_or_undecided() -> None:
    found = results({"a": 0.0, "b": -0.1, "c": 0.1}, 3)
    by_much = {arm: Prediction("", "a guess", arm, "a", high=-0.02) for arm in "bc"}
    assert [verdict(by_much[arm], found.compared(arm, "a")) for arm in "bc"] == ["held", "failed"]
    at_the_effect = Prediction("", "a guess", "b", "a", low=-0.1, high=0.0)
    assert verdict(at_the_effect, found.compared("b", "a")) == "undecided"
    itself = Prediction("", "a calculation", "a", low=1.5, high=2.5)
    assert verdict(itself, found.score("a")) == "held"
    assert ordered_arms(found) == ["b", "a", "c"]
    assert verdict(itself, found.score("a", "a score that no run has")) is None


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_give_no_verdict(seeds: int) -> None:
    found = results({"a": 0.0, "b": -1.0}, seeds).compared("b", "a")
    assert found is not None and found.interval is not None and verdict(BETTER, found) is None


def test_paired_windows_find_an_effect_far_below_their_spread() -> None:
    """Each arm's own interval is more than ten times as wide as that of the difference."""
    found = results({"a": 0.0, "b": -0.02}, 1)
    score, difference = found.score("a"), found.compared("b", "a")
    assert score is not None and difference is not None and score.interval is not None
    assert difference.interval is not None and differs(difference)
    assert score.interval[1] - score.interval[0] > 10 * (difference.interval[1] - difference.interval[0])


def test_runs_on_other_windows_have_no_interval() -> None:
    found = results({"a": 0.0, "b": -1.0}, 3)
    runs = dict(found.runs)
    runs["b", 2] = checkpoint(np.full(WINDOWS, 1.0), digest="other")
    estimate = Results(runs, BITS).compared("b", "a")
    assert estimate is not None and estimate.interval is None and verdict(BETTER, estimate) is None


def test_only_seeds_of_both_arms_are_compared() -> None:
    found = results({"a": 0.0, "b": -0.1}, 4)
    runs = {key: run for key, run in found.runs.items() if key != ("b", 1)}
    estimate = Results(runs, BITS).compared("b", "a")
    assert estimate is not None and len(estimate.by_seed) == 3


@pytest.mark.parametrize(
    ("bound", "effect", "prediction", "expected"),
    [
        # The exact value of b is at most its bound: below a for certain, or anywhere.
        ("b", -0.2, Prediction("", "a guess", "b", "a", high=0.0), "held"),
        ("b", 0.2, Prediction("", "a guess", "b", "a", high=0.0), "undecided"),
        ("b", 0.2, Prediction("", "a guess", "b", "a", low=0.0), "undecided"),
        ("b", -0.2, Prediction("", "a guess", "b", "a", low=0.0), "failed"),
        ("a", 0.2, Prediction("", "a guess", "b", "a", low=0.0), "held"),
        ("a", -0.2, Prediction("", "a guess", "b", "a", low=0.0), "undecided"),
    ],
)
def test_a_bound_is_judged_on_the_side_that_it_limits(
    bound: str, effect: float, prediction: Prediction, expected: str
) -> None:
    rng = np.random.default_rng(0)
    runs = {
        (arm, seed): checkpoint(2.0 + value + rng.normal(0, 0.01, WINDOWS), is_bound=arm == bound)
        for arm, value in (("a", 0.0), ("b", effect))
        for seed in range(3)
    }
    assert verdict(prediction, Results(runs, BITS).compared("b", "a")) == expected


def test_the_interval_of_the_inverse_ratio_is_the_inverse() -> None:
    # Steps that vary as much as those of small models: the interval of the ratios themselves would have a negative end.
    steps = {"a": (650.0, 1850.0, 1800.0), "b": (400.0, 300.0, 200.0)}
    empty = checkpoint(np.zeros(WINDOWS))
    runs = {
        (arm, seed): dataclasses.replace(
            empty, values={"steps": value}, draws={"steps": np.full(DRAWS, value)}, examples={"steps": "steps"}
        )
        for arm, values in steps.items()
        for seed, value in enumerate(values)
    }
    found = Results(runs, "steps")
    ratio, inverse = (found.compared(*arms, is_ratio=True) for arms in (("a", "b"), ("b", "a")))
    assert ratio is not None and ratio.interval is not None
    assert inverse is not None and inverse.interval is not None
    by_seed = (1.625, 1850 / 300, 9.0)
    assert ratio.by_seed == pytest.approx(by_seed)
    assert ratio.value == pytest.approx(math.prod(by_seed) ** (1 / 3)) == pytest.approx(1 / inverse.value)
    low, high = inverse.interval
    assert 0 < ratio.interval[0] < min(by_seed) and ratio.interval == pytest.approx((1 / high, 1 / low))


def test_ratios_have_the_interval_of_the_divided_draws() -> None:
    found = results({"a": 0.0, "b": 2.0}, 3)
    ratio = found.compared("b", "a", is_ratio=True)
    assert ratio is not None and ratio.interval is not None
    assert ratio.interval[0] < ratio.value < ratio.interval[1] and ratio.value == pytest.approx(2.0, rel=0.05)
    twice = Prediction("", "a calculation", "b", "a", 1.9, 2.1, is_ratio=True)
    assert verdict(twice, found.predicted(twice)) == "held"
    assert verdict(dataclasses.replace(twice, is_ratio=False), ratio) == "held"


STEPS = StepsTo("steps", BITS, 1.5)


def curves(tmp_path: Path, values: Mapping[str, tuple[float, ...]], steps_to: StepsTo) -> Results:
    """Return runs of three seeds, evaluated every 10 steps."""
    runs = {}
    for arm, curve in values.items():
        for seed in range(3):
            path = tmp_path / f"{arm}.{seed}"
            path.mkdir()
            for number, value in enumerate(curve, start=1):
                record(path, {"step": 10 * number, CONTINUATION: {"bits_per_byte": value + 0.001 * seed}})
            last = checkpoint(np.full(WINDOWS, curve[-1] + 0.001 * seed))
            runs[arm, seed] = dataclasses.replace(last, path=path, step=10 * len(curve))
    found, unreached = with_steps(runs, [steps_to])
    return Results(found, BITS, unreached)


def test_steps_to_a_score_are_those_of_the_first_evaluation_that_has_it(tmp_path: Path) -> None:
    found = curves(tmp_path, {"a": (2.0, 1.7, 1.4, 1.3), "b": (1.6, 1.2, 1.1, 1.0)}, STEPS)
    assert [found.score(arm, "steps").value for arm in "ab"] == [30, 20]  # type: ignore[union-attr]
    ratio = Prediction("", "a guess", "a", "b", low=1.4, score="steps", is_ratio=True)
    assert verdict(ratio, found.predicted(ratio)) == "held"


def test_steps_of_a_run_that_does_not_reach_the_score_are_a_lower_bound(tmp_path: Path) -> None:
    found = curves(tmp_path, {"a": (2.0, 1.9), "b": (1.4, 1.3), "c": (2.0, 1.8)}, STEPS)
    score, ratio = found.score("a", "steps"), found.compared("a", "b", "steps", is_ratio=True)
    assert score is not None and (score.value, score.side) == (20, "at least")
    assert ratio is not None and (ratio.value, ratio.side) == (pytest.approx(2), "at least")
    inverse = found.compared("b", "a", "steps", is_ratio=True)
    assert inverse is not None and (inverse.value, inverse.side) == (pytest.approx(0.5), "at most")
    # It may be any number above its bound: two such runs cannot be compared.
    above = Prediction("", "a guess", "a", "b", low=3.0, score="steps", is_ratio=True)
    assert verdict(above, ratio) == "undecided" and verdict(dataclasses.replace(above, low=1.9), ratio) == "held"
    assert found.compared("a", "c", "steps") is None


def test_the_target_can_be_the_last_score_of_an_arm_with_the_same_seed(tmp_path: Path) -> None:
    found = curves(tmp_path, {"a": (2.0, 1.7, 1.4), "b": (1.6, 1.39, 1.1)}, StepsTo("steps", BITS, "a"))
    b = found.score("b", "steps")
    assert b is not None and b.by_seed == (20, 20, 20)


def test_summaries_are_computed_for_each_seed_and_judged_as_arms_are() -> None:
    found = results({"a": 0.0, "b": 0.5}, 4)
    runs = {key: run for key, run in found.runs.items() if key != ("b", 3)}
    gap = Summary("gap", ("a", "b"), lambda of: {"bits": of["b"].values[BITS] - of["a"].values[BITS]})
    both = Results(runs, BITS, summaries=summaries_of(runs, [gap]))
    estimate = both.score("gap", "bits")
    assert estimate is not None and estimate.interval is not None and len(estimate.by_seed) == 3
    assert estimate.value == pytest.approx(0.5, abs=0.05)
    prediction = Prediction("", "a calculation", "gap", low=0.4, high=0.6, score="bits")
    assert verdict(prediction, both.predicted(prediction)) == "held"
    for error, message in ((KeyError("bits"), "no 'bits'"), (ValueError("found 4 points"), "found 4 points")):

        def fail(of: object, error: Exception = error) -> dict[str, float]:
            raise error

        with pytest.raises(ConfigError, match=f"summary gap: found runs that it cannot be computed from .{message}"):
            summaries_of(runs, [Summary("gap", ("a", "b"), fail)])
    # A summary is no arm: the pages of runs do not look for its directory.
    assert both.arms == ["a", "b"] and ordered_arms(both) == ["a", "b"]
