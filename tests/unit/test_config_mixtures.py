"""The preset mixtures: the shares that their papers state, by example, and that a run can be made of each."""

from __future__ import annotations

import pytest
from config_examples import changed, example

from t5x_like.config import Objective, PrefixLM, SpanCorruption, mixtures
from t5x_like.config.lengths import expected_loss_tokens, longest
from t5x_like.config.objectives import Layout
from t5x_like.config.validate import validate

SHARES: dict[str, tuple[tuple[Objective, ...], dict[str, float]]] = {
    "ul2": (mixtures.ul2(), {"R": 2 / 7, "X": 4 / 7, "S": 1 / 7}),
    "ul2_rxs": (mixtures.ul2(uniform=False), {"R": 0.4, "X": 0.4, "S": 0.2}),
    "ul2r": (mixtures.ul2r(), {"R": 0.25, "X": 0.25, "S": 0.5}),
    "t5gemma2": (mixtures.t5gemma2(modes=True), {"R": 1 / 8, "X": 3 / 8, "S": 1 / 2}),
}
LAYOUT_OF: dict[str, Layout] = {
    "ul2": "encoder_decoder",
    "ul2r": "prefix_lm",
    "t5gemma2": "encoder_decoder",
    "t5": "encoder_decoder",
    "gpt_bert": "prefix_lm",
    "bert": "encoder",
    "roberta": "encoder",
    "span_bert": "encoder",
    "bart": "encoder_decoder",
    "glm": "prefix_lm",
    "cm3": "causal_lm",
    "fim": "causal_lm",
}


@pytest.mark.parametrize("name", SHARES)
def test_shares_by_example(name: str) -> None:
    mixture, shares = SHARES[name]
    total = sum(objective.rate for objective in mixture)
    for mode, share in shares.items():
        assert sum(o.rate for o in mixture if o.mode == mode) / total == pytest.approx(share)


def test_denoisers_of_the_tables() -> None:
    def table(mixture: tuple[Objective, ...]) -> list[tuple[float, float]]:
        return [(o.mean_noise_span_length, o.noise_density) for o in mixture if isinstance(o, SpanCorruption)]

    def fractions(mixture: tuple[Objective, ...]) -> list[tuple[float, float]]:
        return [(o.min_target_fraction, o.max_target_fraction) for o in mixture if isinstance(o, PrefixLM)]

    assert table(mixtures.ul2()) == [(3, 0.15), (8, 0.15), (3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5)]
    assert table(mixtures.ul2r()) == [(3, 0.15), (32, 0.15), (3, 0.5)]
    assert table(mixtures.t5gemma2()) == [(3, 0.15), (12, 0.5), (32, 0.15), (32, 0.5)]
    assert table(mixtures.t5()) == [(3, 0.15)]
    assert fractions(mixtures.t5gemma2()) == [(0.75, 0.75)]
    assert fractions(mixtures.ul2(target_fractions=(0.0, 1.0))) == [(0.0, 1.0)]
    assert not any(objective.mode for objective in (*mixtures.t5gemma2(), *mixtures.t5()))
    assert [objective.rate for objective in mixtures.gpt_bert()] == [1, 15]


def test_the_mixture_by_loss_token_is_another() -> None:
    """With rows of 512 and 512 cells, T5's lengths and the listing's law of S: 10 % R, 78 % X, 12 % S."""
    mixture = mixtures.ul2(t5_exact=True, target_fractions=(0.0, 1.0))
    raw = {o.name: next(n for n in range(1100, 1, -1) if _inputs(o, n) <= 512) for o in mixture}
    raw["S"] = 511
    tokens = {o.name: expected_loss_tokens(o, raw[o.name]) for o in mixture}
    for mode, share in {"R": 0.10, "X": 0.78, "S": 0.12}.items():
        mine = sum(tokens[o.name] for o in mixture if o.mode == mode)
        assert mine / sum(tokens.values()) == pytest.approx(share, abs=0.005)


def _inputs(objective: Objective, length: int) -> int:
    return longest(objective, length).inputs - 1  # T5's helper does not know of the mode token


@pytest.mark.parametrize("name", LAYOUT_OF)
def test_presets_are_sound(name: str) -> None:
    run = example(LAYOUT_OF[name])
    mixture = getattr(mixtures, name)()
    assert not validate(changed(run, "data.mixture", mixture))
    assert all(objective.rate > 0 for objective in mixture)
    assert len({objective.name for objective in mixture}) == len(mixture)


def test_every_preset_is_listed() -> None:
    public = {
        name for name, value in vars(mixtures).items() if callable(value) and value.__module__ == mixtures.__name__
    }
    assert {name for name in public if not name.startswith("_")} == LAYOUT_OF.keys()
