"""Corpus mixing rates, and validation of mixtures."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from helpers.config_examples import example
from hypothesis import given
from hypothesis import strategies as st

from t5x_like.config import (
    CorpusConfig,
    CorpusMixingConfig,
    CorpusShareConfig,
    DataConfig,
    MaskedLM,
    PrefixLM,
    RatePhaseConfig,
    RunConfig,
    SpanCorruption,
    Supervised,
)
from t5x_like.config.mixture_schedule import Phase, blocks_per_period, corpus_rates, phases, proportional, unimax
from t5x_like.config.validation import validate

corpus_sizes = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 10**12), min_size=1)


@given(tokens=corpus_sizes, temperature=st.floats(0.5, 20), maximum=st.none() | st.integers(1, 10**12))
def test_proportional_rates_follow_t5s_formula(tokens: dict[str, int], temperature: float, maximum: int | None) -> None:
    shares = proportional(tokens, temperature, maximum)
    assert sum(shares.values()) == pytest.approx(1)
    capped = {name: min(size, maximum or size) for name, size in tokens.items()}
    for one in tokens:
        for two in tokens:
            ratio = (capped[one] / capped[two]) ** (1 / temperature)
            assert shares[one] / shares[two] == pytest.approx(ratio, rel=1e-6)


def test_proportional_rates_of_known_sizes() -> None:
    """mT5's alpha of 0.3 is a temperature of 1 / 0.3."""
    shares = proportional({"en": 1000, "sw": 1}, 1 / 0.3, None)
    assert shares["en"] / shares["sw"] == pytest.approx(1000**0.3)
    assert proportional({"en": 1000, "sw": 1}, 1.0, 9) == pytest.approx({"en": 0.9, "sw": 0.1})


@given(tokens=corpus_sizes, budget=st.integers(1, 10**13), epochs=st.floats(0.1, 10))
def test_unimax_is_even_up_to_its_epoch_limit(tokens: dict[str, int], budget: int, epochs: float) -> None:
    shares = unimax(tokens, budget, epochs)
    assert sum(shares.values()) == pytest.approx(1)
    given_tokens = {name: share * min(budget, sum(tokens.values()) * epochs) for name, share in shares.items()}
    most = max(given_tokens.values())
    for name, amount in given_tokens.items():
        assert amount <= tokens[name] * epochs * (1 + 1e-9)
        # A corpus with less than the largest share is at its epoch limit.
        assert amount == pytest.approx(most) or amount == pytest.approx(tokens[name] * epochs)


def test_rates_multiply_shares_by_size() -> None:
    phase, tokens = Phase(0, {}, {"a": 2.0, "b": 1.0}), {"a": 10, "b": 30}
    assert corpus_rates(CorpusMixingConfig(), phase, tokens) == [2.0, 1.0]
    assert corpus_rates(CorpusMixingConfig(strategy="proportional"), phase, tokens) == pytest.approx([0.5, 0.75])
    even = CorpusMixingConfig(strategy="unimax", budget_tokens=8, max_epochs=1.0)
    assert corpus_rates(even, phase, tokens) == pytest.approx([1.0, 0.5])


def test_temperature_changes_by_phase() -> None:
    """Annealed sampling of languages: the shares become more even from phase to phase (mmBERT)."""
    mixing = CorpusMixingConfig(strategy="proportional", temperature=1.0)
    data = dataclasses.replace(
        example().data,
        corpus_mixing=mixing,
        rate_schedule=(
            RatePhaseConfig(start_step=5, temperature=2.0),
            RatePhaseConfig(start_step=7, objectives=()),
            RatePhaseConfig(start_step=9, temperature=1e9),
        ),
    )
    assert [phase.temperature for phase in phases(data)] == [1.0, 2.0, 2.0, 1e9]
    even = [dataclasses.replace(phase, corpora={"a": 1.0, "b": 1.0}) for phase in phases(data)]
    ratios = [np.divide(*corpus_rates(mixing, phase, {"a": 900, "b": 100})) for phase in even]
    assert ratios == pytest.approx([9.0, 3.0, 3.0, 1.0])


def test_period_is_long_enough_for_the_smallest_corpus() -> None:
    """UniMax gives shares far below a thousandth. Rounded up to a thousandth, they would be read for 190 epochs."""
    tokens = {f"rare{i}": 10**6 for i in range(60)} | {f"large{i}": 10**11 for i in range(10)}
    budget = 2 * 10**11
    counts = blocks_per_period(list(unimax(tokens, budget, 4.0).values()), most=None)
    epochs = [count / sum(counts) * budget / size for count, size in zip(counts, tokens.values(), strict=True)]
    assert max(epochs) < 4.0 * 1.05


def test_phases_change_the_named_rates_only() -> None:
    data = dataclasses.replace(
        example().data,
        mixture=(SpanCorruption(name="x", rate=3.0), PrefixLM(name="y")),
        rate_schedule=(
            RatePhaseConfig(start_step=5, objectives=(("y", 2.0),)),
            RatePhaseConfig(start_step=9, objectives=(("x", 0.0),)),
        ),
    )
    assert [(phase.start_step, dict(phase.objectives)) for phase in phases(data)] == [
        (0, {"x": 3.0, "y": 1.0}),
        (5, {"x": 3.0, "y": 2.0}),
        (9, {"x": 0.0, "y": 2.0}),
    ]


def mixed(**changes: Any) -> RunConfig:
    run = example()
    shares = tuple(
        CorpusShareConfig(name=name, corpus=CorpusConfig(max_documents=size)) for name, size in (("a", 5), ("b", 6))
    )
    mixture = (SpanCorruption(name="x"), PrefixLM(name="y"))
    data = dataclasses.replace(run.data, corpora=shares, mixture=mixture)
    return dataclasses.replace(run, data=dataclasses.replace(data, **changes))


SHORT = "data.targets_length_buckets"
LATER = (
    CorpusShareConfig(name="a", corpus=CorpusConfig()),
    CorpusShareConfig(name="b", corpus=CorpusConfig(), rate=0.0),
)
PAIRS = CorpusConfig(files=("x.jsonl",), inputs_field="inputs")
TAUGHT = (CorpusShareConfig(name="a", corpus=PAIRS, example_mode="documents", mixture=(Supervised(mode="S"),)),)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({}, []),
        ({"corpus": CorpusConfig(max_documents=9)}, ["data.corpora"]),
        (
            {"corpora": (CorpusShareConfig(name="a", corpus=PAIRS),)},
            ["data.corpora.0.mixture", "data.corpora.0.example_mode"],
        ),
        (
            {
                "corpora": (
                    CorpusShareConfig(name="a", corpus=PAIRS, example_mode="documents", mixture=(Supervised(),)),
                )
            },
            [],
        ),
        (
            {"corpora": (CorpusShareConfig(name="a", corpus=CorpusConfig(), mixture=(Supervised(),)),)},
            ["data.corpora.0.mixture"],
        ),
        (
            {"corpora": (CorpusShareConfig(name="a", corpus=CorpusConfig(), mixture=(PrefixLM(name="x"),)),)},
            ["data.corpora.0.mixture"],
        ),
        (
            {"corpora": tuple(CorpusShareConfig(name="a", corpus=CorpusConfig()) for _ in range(2))},
            ["data.corpora.1.name"],
        ),
        ({"corpora": (CorpusShareConfig(name="a", corpus=CorpusConfig(), rate=0.0),)}, ["data.corpora.0.rate"]),
        ({"corpora": TAUGHT, "inputs_length": 2}, ["data.inputs_length"]),
        ({"corpora": TAUGHT, "layout": "causal_lm", "inputs_length": 2}, ["data.inputs_length"]),
        ({"corpora": TAUGHT, "layout": "causal_lm", "targets_length": 1}, ["data.targets_length"]),
        ({"corpus_mixing": CorpusMixingConfig(strategy="unimax")}, ["data.corpus_mixing.budget_tokens"]),
        ({"corpus_mixing": CorpusMixingConfig(temperature=0.0)}, ["data.corpus_mixing.temperature"]),
        ({"rate_schedule": (RatePhaseConfig(start_step=0),)}, ["data.rate_schedule.0.start_step"]),
        (
            {"rate_schedule": (RatePhaseConfig(start_step=3, objectives=(("z", 1.0),)),)},
            ["data.rate_schedule.0.objectives"],
        ),
        (
            {"rate_schedule": (RatePhaseConfig(start_step=3, corpora=(("a", 0.0), ("b", 0.0))),)},
            ["data.rate_schedule.0.corpora"],
        ),
        # A rate of 0 needs a schedule that raises it.
        (
            {"rate_schedule": (RatePhaseConfig(start_step=3, temperature=2.0),)},
            ["data.rate_schedule.0.temperature"],
        ),
        ({"corpora": LATER, "rate_schedule": (RatePhaseConfig(start_step=3, corpora=(("b", 1.0),)),)}, []),
        ({"corpora": LATER}, ["data.corpora.1.rate"]),
        (
            {"corpora": LATER[1:], "rate_schedule": (RatePhaseConfig(start_step=3, corpora=(("b", 1.0),)),)},
            ["data.corpora"],
        ),
        (
            {"example_mode": "documents", "rate_schedule": (RatePhaseConfig(start_step=3, objectives=(("x", 2.0),)),)},
            ["data.rate_schedule"],
        ),
        ({"example_mode": "documents", "rate_schedule": (RatePhaseConfig(start_step=3, corpora=(("a", 2.0),)),)}, []),
        ({"example_mode": "documents", "rate_unit": "token"}, ["data.rate_unit"]),
        (
            {"example_mode": "documents", "mixture": (PrefixLM(name="y", complementary_pairs=True),)},
            ["data.corpora.0.mixture"],
        ),
        ({"targets_length_buckets": (64,)}, [SHORT]),
        ({"layout": "encoder", "mixture": (MaskedLM(),), "targets_length": 0, "targets_length_buckets": (9,)}, [SHORT]),
    ],
)
def test_invalid_mixtures_are_reported_by_field(changes: dict[str, Any], where: list[str]) -> None:
    found = {problem.where for problem in validate(mixed(**changes)) if problem.where.startswith("data")}
    assert set(where) <= found and bool(found) == bool(where)


def test_schedule_must_keep_the_rows_of_each_sub_batch() -> None:
    mixture = (SpanCorruption(name="x", mode="R"), SpanCorruption(name="y", noise_density=0.5, mode="X"))
    short: dict[str, Any] = {"mixture": mixture, "targets_length_buckets": (24,)}
    even = mixed(**short, rate_schedule=(RatePhaseConfig(start_step=3, corpora=(("a", 5.0),)),))
    assert [problem.where for problem in validate(even)] == []
    uneven: DataConfig = dataclasses.replace(
        even.data, rate_schedule=(RatePhaseConfig(start_step=3, objectives=(("x", 2.0),)),)
    )
    assert [problem.where for problem in validate(dataclasses.replace(even, data=uneven))] == ["data.rate_schedule"]
