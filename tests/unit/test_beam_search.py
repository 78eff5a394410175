"""Beam search against all sequences of a tiny vocabulary, and against itself in other batches."""

import dataclasses

import jax
import numpy as np
import pytest
import test_decoding_generate as tiny

from t5x_like.config import ConfigError, PartitioningConfig
from t5x_like.decoding.beam import BeamSearch
from t5x_like.decoding.constraints import Constraints
from t5x_like.decoding.generate import beam_tokens, generate_tokens
from t5x_like.decoding.sampling import Sampling
from t5x_like.decoding.scoring import score_tokens
from t5x_like.decoding.stops import make_stops
from t5x_like.program import assemble

EOS = 1
FEW = [EOS, 7, 21, 40]
"""With so few allowed tokens all sequences can be listed."""
PROMPTS = [[5, 9, 33, 7], [8], [60, 2, 12]]
ALLOWED = np.isin(np.arange(tiny.VOCABULARY), FEW)
LIMIT = 4


def penalized(search, log_p, length):
    base = (5 + length) / 6 if search.like == "t5x" else length
    return log_p / base**search.length_penalty


def listed(program, params, prompt, search, *, bidirectional=False):
    """All sequences that may come out, best first: (tokens without EOS, score)."""
    sequences = [[]]
    ended = [[EOS]]
    for _ in range(LIMIT - 1):
        sequences = [[*s, t] for s in sequences for t in FEW if t != EOS]
        ended += [[*s, EOS] for s in sequences]
    if search.like == "transformers":
        ended += [[*s, t] for s in sequences for t in FEW if t != EOS]
    scores = score_tokens(program, params, [(prompt, s) for s in ended], bidirectional=bidirectional)
    found = [(penalized(search, score.sum, len(s)), s) for s, score in zip(ended, scores, strict=True)]
    return [([t for t in s if t != EOS], score) for score, s in sorted(found, key=lambda pair: -pair[0])]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["encoder_decoder", "prefix_lm", "causal_lm"])
@pytest.mark.parametrize(
    "search",
    [
        BeamSearch(64, 0.6),
        BeamSearch(64, 2.0),
        BeamSearch(64, 0.0),
        BeamSearch(64, 1.0, "transformers", early_stopping="never"),
    ],
    ids=["t5x", "t5x long", "no penalty", "transformers"],
)
def test_with_enough_beams_the_search_is_exhaustive(layout, search):
    program, params = tiny.untrained(layout, "rope")
    bidirectional = layout == "prefix_lm"
    settings = dict(allowed_V=ALLOWED, max_new_tokens=LIMIT, bidirectional=bidirectional)
    for prompt, found in zip(PROMPTS, beam_tokens(program, params, PROMPTS, search=search, **settings), strict=True):
        expected = listed(program, params, prompt, search, bidirectional=bidirectional)[: search.size]
        assert len(found) == min(len(expected), search.size)
        np.testing.assert_allclose([h.score for h in found], [score for _, score in expected], rtol=1e-4, atol=1e-4)
        for hypothesis, (tokens, score) in zip(found, expected, strict=True):
            assert hypothesis.tokens == tokens or abs(hypothesis.score - score) < 1e-3
        assert found[0].tokens == expected[0][0]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert [h.tokens for h in one] == [h.tokens for h in other]
        np.testing.assert_allclose([h.score for h in one], [h.score for h in other], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_prompt_does_not_depend_on_its_neighbours_and_keeps_its_own_limit():
    program, params = tiny.untrained("causal_lm", "rope")
    search = BeamSearch(3, 0.6)
    limits = [5, 12, 9]
    settings = dict(search=search, allowed_V=np.ones(tiny.VOCABULARY, bool))
    together = beam_tokens(program, params, PROMPTS, max_new_tokens=limits, **settings)
    alone = [
        beam_tokens(program, params, [prompt], max_new_tokens=limit, **settings)[0]
        for prompt, limit in zip(PROMPTS, limits, strict=True)
    ]
    assert_same(together, alone)
    # What has not ended by the limit counts only where nothing has.
    assert all(len(h.tokens) <= limit for row, limit in zip(together, limits, strict=True) for h in row)


@pytest.mark.slow
def test_one_beam_without_eos_is_greedy_decoding():
    program, params = tiny.untrained("encoder_decoder", "rope")
    settings = dict(allowed_V=tiny.ALLOWED, max_new_tokens=10)
    beams = beam_tokens(program, params, PROMPTS, search=BeamSearch(1), **settings)
    assert [row[0].tokens for row in beams] == generate_tokens(program, params, PROMPTS, **settings)
    penalty = Sampling(repetition_penalty=1e4)
    different = beam_tokens(program, params, PROMPTS, search=BeamSearch(1), sampling=penalty, **settings)
    assert all(len(set(row[0].tokens)) == 10 for row in different)


@pytest.mark.slow
def test_choices_are_ranked_by_likelihood_and_a_stop_string_ends_a_hypothesis():
    program, params = tiny.untrained("causal_lm", "rope")
    everything = np.ones(tiny.VOCABULARY, bool)
    choices = [[5, 6], [5, 7, 8], [40], [41, 2, 2, 9], [5, 6, 3]]
    constraints = Constraints(EOS)
    start = constraints.choices(choices)
    found = beam_tokens(
        program,
        params,
        PROMPTS,
        search=BeamSearch(8, 0.0),
        allowed_V=everything,
        max_new_tokens=8,
        automaton=constraints.automaton(),
        start_states=[start] * 3,
    )
    for prompt, row in zip(PROMPTS, found, strict=True):
        scores = score_tokens(program, params, [(prompt, [*choice, EOS]) for choice in choices])
        order = sorted(zip(scores, choices, strict=True), key=lambda pair: -pair[0].sum)
        assert [h.tokens for h in row] == [choice for _, choice in order]
        np.testing.assert_allclose([h.score for h in row], [score.sum for score, _ in order], rtol=1e-4, atol=1e-4)

    stops = make_stops(["b"], [b"", b"", *[b"b" if token % 5 == 0 else b"a" for token in range(2, 64)]], 64)
    for row in beam_tokens(
        program, params, PROMPTS, search=BeamSearch(4), allowed_V=tiny.ALLOWED, max_new_tokens=20, stops=stops
    ):
        assert all(h.tokens[-1] % 5 == 0 and all(t % 5 for t in h.tokens[:-1]) for h in row)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["encoder_decoder", "causal_lm"])
def test_hypotheses_and_draws_do_not_depend_on_the_mesh(layout):
    program, params = tiny.untrained(layout, "rope")
    run = dataclasses.replace(program.run, partitioning=PartitioningConfig(data=2, fsdp=2, tensor=2))
    split = assemble(run, jax.devices())
    placed = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), params, split.abstract_params)
    settings = dict(allowed_V=np.ones(tiny.VOCABULARY, bool), max_new_tokens=8)
    searched = [
        beam_tokens(*of, PROMPTS, search=BeamSearch(3), **settings) for of in ((program, params), (split, placed))
    ]
    assert_same(*searched)
    sampling = Sampling(temperature=1.2, top_k=30, top_p=0.9, min_p=0.01, repetition_penalty=1.3)
    drawn = [
        generate_tokens(*of, PROMPTS, sampling=sampling, seed=3, **settings)
        for of in ((program, params), (split, placed))
    ]
    assert drawn[0] == drawn[1]


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="beam_size") as caught:
        BeamSearch(0, -1.0, early_stopping=True)
    assert len(caught.value.problems) == 3
