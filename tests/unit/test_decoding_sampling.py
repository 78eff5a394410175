"""Choosing a token: exact supports, the right distribution, and draws that belong to a row alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.config import ConfigError
from t5x_like.decoding.sampling import Sampling, candidates, choose, draw_keys, restrict

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.2, 0.25])
LOGITS = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32))[None]


def support(logits_BxV, sampling):
    scaled_BxK, ids_BxK = candidates(logits_BxV, sampling)
    return set(np.asarray(ids_BxK)[np.isfinite(scaled_BxK)].tolist())


@pytest.mark.parametrize("k", range(1, 8))
def test_top_k_support_is_the_k_most_likely(k):
    assert support(LOGITS, Sampling(temperature=0.7, top_k=k)) == set([1, 4, 3, 0, 2][:k])


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.01, {1}),
        (0.39, {1}),
        (0.41, {1, 4}),
        (0.64, {1, 4}),
        (0.66, {1, 4, 3}),
        (0.94, {1, 4, 3, 0}),
        (1.0, set(range(5))),
    ],
)
def test_top_p_support_is_the_fewest_tokens_that_reach_p(p, expected):
    assert support(LOGITS, Sampling(temperature=1.0, top_p=p)) == expected


def test_top_p_counts_probabilities_after_temperature_and_top_k():
    # At temperature 0.5 the probabilities are squared: 0.16, 0.0625, 0.04, ... of 0.275, so 1 and 4 hold 0.81.
    assert support(LOGITS, Sampling(temperature=0.5, top_p=0.8)) == {1, 4}
    # Of the two most likely, 0.4 and 0.25, the first holds 0.615.
    assert support(LOGITS, Sampling(temperature=1.0, top_k=2, top_p=0.61)) == {1}
    assert support(LOGITS, Sampling(temperature=1.0, top_k=2, top_p=0.62)) == {1, 4}


def test_top_k_is_exact_where_logits_are_equal():
    assert support(jnp.zeros((1, 9)), Sampling(temperature=1.0, top_k=4)) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), PROBABILITIES),
        (Sampling(temperature=2.0), np.sqrt(PROBABILITIES)),
        (Sampling(temperature=1.0, top_k=3), np.array([0, 0.4, 0, 0.2, 0.25])),
        (Sampling(temperature=1.0, top_p=0.5), np.array([0, 0.4, 0, 0, 0.25])),
    ],
)
def test_draws_follow_the_distribution(sampling, expected):
    """Pearson's statistic of 20,000 draws stays below the 1 - 1e-4 quantile of chi-square; the seed is fixed."""
    draws = 20_000
    keys = draw_keys(jnp.uint32(3), jnp.arange(draws), jnp.zeros(draws, jnp.int32))
    drawn = np.bincount(np.asarray(choose(jnp.tile(LOGITS, (draws, 1)), keys, sampling)), minlength=5)
    expected = draws * expected / expected.sum()
    assert (drawn[expected == 0] == 0).all()
    inside = expected > 0
    statistic = ((drawn - expected)[inside] ** 2 / expected[inside]).sum()
    assert statistic < {1: 15.14, 2: 18.42, 4: 23.51}[inside.sum() - 1]


def test_greedy_takes_the_most_likely_allowed_token():
    allowed = jnp.array([True, False, True, True, True])
    keys = draw_keys(jnp.uint32(0), jnp.arange(1), jnp.arange(1))
    assert choose(restrict(LOGITS, allowed), keys, Sampling()).tolist() == [4]
    drawn = {int(choose(restrict(LOGITS, allowed), keys, Sampling(temperature=9.0, top_k=k))[0]) for k in range(1, 6)}
    assert 1 not in drawn


def test_keys_depend_on_seed_row_and_position():
    data = [
        jax.random.key_data(draw_keys(jnp.uint32(seed), jnp.array([row]), jnp.array([position])))
        for seed in range(3)
        for row in range(3)
        for position in range(3)
    ]
    assert len({tuple(np.asarray(d).ravel().tolist()) for d in data}) == 27


def test_settings_out_of_range_are_refused_all_at_once():
    with pytest.raises(ConfigError) as caught:
        Sampling(temperature=-1.0, top_k=0, top_p=1.5)
    assert [problem.where for problem in caught.value.problems] == ["temperature", "top_k", "top_p"]
    with pytest.raises(ConfigError):
        Sampling(temperature=float("nan"))
