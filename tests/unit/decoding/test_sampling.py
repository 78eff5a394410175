"""Sampling: exact supports, the right distribution, and draws that depend on a row only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.decoding.sampling import (
    RowSampling,
    Sampling,
    apply_repetition_penalty,
    argmax_token,
    draw_keys,
    restrict,
    sample,
    warp,
)
from t5x_like.errors import ConfigError

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.2, 0.25])
LOGITS = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32))[None]


WARP, CHOOSE, KEYS = jax.jit(warp), jax.jit(sample), jax.jit(draw_keys)


def support(logits_BxV, sampling):
    return set(np.flatnonzero(np.isfinite(WARP(logits_BxV, sampling.for_rows(1)))).tolist())


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
    # At temperature 0.5 the probabilities are squared: 0.16, 0.0625, 0.04, ... of 0.275, so 1 and 4 have 0.81.
    assert support(LOGITS, Sampling(temperature=0.5, top_p=0.8)) == {1, 4}
    # Of the two most likely, 0.4 and 0.25, the first has 0.615.
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
    keys = KEYS(jnp.uint32(3), jnp.arange(draws), jnp.zeros(draws, jnp.int32))
    drawn = np.bincount(np.asarray(CHOOSE(jnp.tile(LOGITS, (draws, 1)), keys, sampling.for_rows(draws))), minlength=5)
    expected = draws * expected / expected.sum()
    assert (drawn[expected == 0] == 0).all()
    inside = expected > 0
    statistic = ((drawn - expected)[inside] ** 2 / expected[inside]).sum()
    assert statistic < {1: 15.14, 2: 18.42, 4: 23.51}[inside.sum() - 1]


def sorted_support(logits, temperature, top_k, top_p, min_p):
    """Return the support by sorting, in double precision; of equal logits the lower id comes first."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")[: top_k or len(logits)]
    order = order[np.isfinite(scaled[order])]
    if top_p is not None:
        p = np.exp(scaled[order] - scaled[order].max())
        before = np.cumsum(p / p.sum()) - p / p.sum()
        order = order[before < top_p]
    if min_p is not None:
        order = order[scaled[order] >= scaled.max() + np.log(min_p)]
    return set(order.tolist())


SETTINGS = [
    (temperature, top_k, top_p, min_p)
    for temperature in (0.5, 1.3)
    for top_k in (None, 1, 7, 500)
    for top_p in (None, 0.31, 0.93)
    for min_p in (None, 0.057)
]


def test_support_equals_that_by_sorting_with_settings_per_row():
    """Logits with many equal values, both signs and excluded tokens; each row has its own settings."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (len(SETTINGS), 300)).round(1).astype(np.float32)
    logits[rng.random(logits.shape) < 0.1] = -np.inf
    temperature, top_k, top_p, min_p = zip(*SETTINGS, strict=True)
    rows = RowSampling(
        jnp.array(temperature),
        jnp.array([k or 300 for k in top_k]),
        jnp.array([p or 1.0 for p in top_p]),
        jnp.array([p or 0.0 for p in min_p]),
    )
    result = np.asarray(WARP(jnp.asarray(logits), rows))
    for row, settings in enumerate(SETTINGS):
        support = set(np.flatnonzero(np.isfinite(result[row])).tolist())
        assert support == sorted_support(logits[row], *settings), settings


def test_greedy_and_sampled_rows_in_one_batch():
    logits = jnp.tile(LOGITS, (200, 1))
    rows = RowSampling(jnp.arange(200) % 2 * 1.0)
    keys = KEYS(jnp.uint32(1), jnp.arange(200), jnp.zeros(200, jnp.int32))
    drawn = np.asarray(CHOOSE(logits, keys, rows))
    assert (drawn[::2] == 1).all() and len(set(drawn[1::2].tolist())) == 5


def test_min_p_is_relative_to_the_most_likely_token():
    assert support(LOGITS, Sampling(temperature=1.0, min_p=0.45)) == {1, 3, 4}
    assert support(LOGITS, Sampling(temperature=0.5, min_p=0.45)) == {1}
    assert support(LOGITS, Sampling(temperature=1.0, min_p=0.0)) == set(range(5))


def test_repetition_penalty_lowers_seen_tokens_of_either_sign():
    logits = jnp.array([[2.0, -2.0, 0.0, 2.0, -2.0]])
    seen = jnp.array([[True, True, True, False, False]])
    assert apply_repetition_penalty(logits, seen, jnp.array([2.0])).tolist() == [[1.0, -4.0, 0.0, 2.0, -2.0]]


def test_argmax_is_the_first_largest_logit():
    rng = np.random.default_rng(0)
    logits = rng.integers(-3, 3, (50, 30)).astype(np.float32)
    logits[logits == -3] = -np.inf
    logits[7] = -np.inf
    assert argmax_token(jnp.asarray(logits)).tolist() == logits.argmax(axis=-1).tolist()
    assert argmax_token(jnp.full((1, 3), jnp.nan)).tolist() == [0]
    keys = KEYS(jnp.uint32(2), jnp.arange(50), jnp.zeros(50, jnp.int32))
    drawn = CHOOSE(jnp.asarray(logits), keys, Sampling(temperature=1.0).for_rows(50))
    assert drawn.tolist() == jax.vmap(jax.random.categorical)(keys, jnp.asarray(logits)).tolist()


def test_greedy_sampling_selects_the_most_likely_allowed_token():
    allowed = jnp.array([True, False, True, True, True])
    keys = KEYS(jnp.uint32(0), jnp.arange(1), jnp.arange(1))
    assert sample(restrict(LOGITS, allowed), keys, Sampling()).tolist() == [4]
    drawn = {
        int(CHOOSE(restrict(LOGITS, allowed), keys, Sampling(temperature=9.0, top_k=k).for_rows(1))[0])
        for k in range(1, 6)
    }
    assert 1 not in drawn


def test_keys_depend_on_seed_row_and_position():
    data = [
        jax.random.key_data(KEYS(jnp.uint32(seed), jnp.array([row]), jnp.array([position])))
        for seed in range(3)
        for row in range(3)
        for position in range(3)
    ]
    assert len({tuple(np.asarray(d).ravel().tolist()) for d in data}) == 27


def test_all_settings_out_of_range_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        Sampling(temperature=-1.0, top_k=0, top_p=1.5, min_p=-0.1, repetition_penalty=0.0)
    result = [problem.where for problem in caught.value.problems]
    assert result == ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"]
    with pytest.raises(ConfigError):
        Sampling(temperature=float("nan"))
