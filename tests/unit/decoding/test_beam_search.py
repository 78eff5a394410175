"""Beam search against an enumeration of all sequences, and against itself in other batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import decoding_examples as tiny

from t5x_like.config import ModelConfig, ShardingConfig, StackConfig
from t5x_like.decoding.beam_search import BeamSearch
from t5x_like.decoding.constrained import Constraints
from t5x_like.decoding.decode_loop import read_prompts
from t5x_like.decoding.engine import beam_tokens, generate_tokens
from t5x_like.decoding.log_likelihood import score_tokens
from t5x_like.decoding.sampling import Sampling
from t5x_like.decoding.stop_strings import compile_stop_strings
from t5x_like.errors import ConfigError, DataError
from t5x_like.models.factory import abstract_model, bind_params
from t5x_like.program import build_program

EOS = 1
ALLOWED_IDS = [EOS, 7, 21, 40]
"""Allowed tokens, few enough to enumerate all sequences."""
PROMPTS = [[5, 9, 33, 7], [8], [60, 2, 12]]
ALLOWED = np.isin(np.arange(tiny.VOCABULARY), ALLOWED_IDS)
LIMIT = 4


def normalized_score(search, log_p, length):
    base = (5 + length) / 6 if search.variant == "t5x" else length
    return log_p / base**search.length_penalty


def enumerate_results(program, params, prompt, search, *, bidirectional=False):
    """Return all possible results, best first: (tokens without EOS, score)."""
    sequences = [[]]
    ended = [[EOS]]
    for _ in range(LIMIT - 1):
        sequences = [[*s, t] for s in sequences for t in ALLOWED_IDS if t != EOS]
        ended += [[*s, EOS] for s in sequences]
    if search.variant == "transformers":
        ended += [[*s, t] for s in sequences for t in ALLOWED_IDS if t != EOS]
    scores = score_tokens(program, params, [(prompt, s) for s in ended], bidirectional=bidirectional)
    result = [(normalized_score(search, score.sum, len(s)), s) for s, score in zip(ended, scores, strict=True)]
    return [([t for t in s if t != EOS], score) for score, s in sorted(result, key=lambda pair: -pair[0])]


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
def test_search_with_enough_beams_is_exhaustive(layout, search):
    program, params = tiny.untrained(layout, "rope")
    bidirectional = layout == "prefix_lm"
    settings = dict(allowed_V=ALLOWED, max_new_tokens=LIMIT, bidirectional=bidirectional)
    for prompt, result in zip(PROMPTS, beam_tokens(program, params, PROMPTS, search=search, **settings), strict=True):
        expected = enumerate_results(program, params, prompt, search, bidirectional=bidirectional)[: search.size]
        assert len(result) == min(len(expected), search.size)
        np.testing.assert_allclose([h.score for h in result], [score for _, score in expected], rtol=1e-4, atol=1e-4)
        for hypothesis, (tokens, score) in zip(result, expected, strict=True):
            assert hypothesis.tokens == tokens or abs(hypothesis.score - score) < 1e-3
        assert result[0].tokens == expected[0][0]


def assert_same(result, expected):
    for one, other in zip(result, expected, strict=True):
        assert [h.tokens for h in one] == [h.tokens for h in other]
        np.testing.assert_allclose([h.score for h in one], [h.score for h in other], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_result_of_a_prompt_is_independent_of_the_batch():
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
    # Unfinished hypotheses at the limit are results only where none has finished.
    assert all(len(h.tokens) <= limit for row, limit in zip(together, limits, strict=True) for h in row)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error_and_no_text(value):
    program, params = tiny.untrained("causal_lm", "rope")
    params = jax.tree.map(np.copy, params)
    params["decoder"]["final_norm"]["scale"][0] = value
    settings = dict(allowed_V=tiny.ALLOWED, max_new_tokens=3)
    with pytest.raises(DataError, match=r"prompt \d: found logits of its new token 0 that are not finite"):
        generate_tokens(program, params, PROMPTS, **settings)
    if np.isnan(value):
        with pytest.raises(DataError, match=r"prompt \d: found logits of a beam that are not finite"):
            beam_tokens(program, params, PROMPTS, search=BeamSearch(2), **settings)


def test_hypotheses_stay_alive_although_all_likely_tokens_complete_a_stop_string():
    """All tokens but the two least likely complete the stop string, far more than there are candidates."""
    program, params = tiny.untrained("causal_lm", "rope")
    first = score_tokens(program, params, [(PROMPTS[0], [token]) for token in range(2, tiny.VOCABULARY)])
    others = (2 + np.argsort([score.sum for score in first])[:2]).tolist()
    pieces = [b"", b"", *[b"a" if token in others else b"b" for token in range(2, tiny.VOCABULARY)]]
    stops = compile_stop_strings(["b"], pieces, tiny.VOCABULARY)
    allowed = np.arange(tiny.VOCABULARY) > EOS
    ended, alive = [], [[]]
    for _ in range(3):
        ended += [[*tokens, token] for tokens in alive for token in np.flatnonzero(allowed).tolist()]
        alive = [[*tokens, token] for tokens in alive for token in others]
        ended = [tokens for tokens in ended if tokens[-1] not in others]
    # With this penalty the longest hypotheses are the best. All that do not end stay alive, so the best is found.
    search = BeamSearch(4, 20.0)
    scores = score_tokens(program, params, [(PROMPTS[0], tokens) for tokens in ended])
    best = max(range(len(ended)), key=lambda n: normalized_score(search, scores[n].sum, len(ended[n])))
    (found,) = beam_tokens(
        program, params, PROMPTS[:1], search=search, allowed_V=allowed, max_new_tokens=3, stops=stops
    )
    assert found[0].tokens == ended[best] and len(ended[best]) == 3


@pytest.mark.slow
def test_one_beam_without_eos_equals_greedy_decoding():
    program, params = tiny.untrained("encoder_decoder", "rope")
    settings = dict(allowed_V=tiny.ALLOWED, max_new_tokens=10)
    beams = beam_tokens(program, params, PROMPTS, search=BeamSearch(1), **settings)
    assert [row[0].tokens for row in beams] == generate_tokens(program, params, PROMPTS, **settings)
    penalty = Sampling(repetition_penalty=1e4)
    different = beam_tokens(program, params, PROMPTS, search=BeamSearch(1), sampling=penalty, **settings)
    assert all(len(set(row[0].tokens)) == 10 for row in different)


@pytest.mark.slow
def test_choices_are_ranked_by_likelihood_and_stop_strings_end_hypotheses():
    program, params = tiny.untrained("causal_lm", "rope")
    all_tokens = np.ones(tiny.VOCABULARY, bool)
    choices = [[5, 6], [5, 7, 8], [40], [41, 2, 2, 9], [5, 6, 3]]
    constraints = Constraints(EOS)
    start = constraints.choices(choices)
    result = beam_tokens(
        program,
        params,
        PROMPTS,
        search=BeamSearch(8, 0.0),
        allowed_V=all_tokens,
        max_new_tokens=8,
        automaton=constraints.automaton(),
        start_states=[start] * 3,
    )
    for prompt, row in zip(PROMPTS, result, strict=True):
        scores = score_tokens(program, params, [(prompt, [*choice, EOS]) for choice in choices])
        order = sorted(zip(scores, choices, strict=True), key=lambda pair: -pair[0].sum)
        assert [h.tokens for h in row] == [choice for _, choice in order]
        np.testing.assert_allclose([h.score for h in row], [score.sum for score, _ in order], rtol=1e-4, atol=1e-4)

    stops = compile_stop_strings(["b"], [b"", b"", *[b"b" if token % 5 == 0 else b"a" for token in range(2, 64)]], 64)
    for row in beam_tokens(
        program, params, PROMPTS, search=BeamSearch(4), allowed_V=tiny.ALLOWED, max_new_tokens=20, stops=stops
    ):
        assert all(h.tokens[-1] % 5 == 0 and all(t % 5 for t in h.tokens[:-1]) for h in row)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["encoder_decoder", "causal_lm"])
def test_hypotheses_and_draws_are_independent_of_the_mesh(layout):
    program, params = tiny.untrained(layout, "rope")
    run = dataclasses.replace(program.run, sharding=ShardingConfig(data=2, fsdp=2, tensor=2))
    split = build_program(run, jax.devices())
    placed = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), params, split.abstract_params)
    settings = dict(allowed_V=np.ones(tiny.VOCABULARY, bool), max_new_tokens=8)
    searched = [
        beam_tokens(*model, PROMPTS, search=BeamSearch(3), **settings) for model in ((program, params), (split, placed))
    ]
    assert_same(*searched)
    sampling = Sampling(temperature=1.2, top_k=30, top_p=0.9, min_p=0.01, repetition_penalty=1.3)
    drawn = [
        generate_tokens(*model, PROMPTS, sampling=sampling, seed=3, **settings)
        for model in ((program, params), (split, placed))
    ]
    assert drawn[0] == drawn[1]


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="beam_size") as caught:
        BeamSearch(0, -1.0, early_stopping=True)
    assert len(caught.value.problems) == 3


STACK = StackConfig(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=64)
WINDOWS = dataclasses.replace(STACK, positions="rope", layer_pattern=("local", "global"), sliding_window=(5, 3))
MODELS = {
    "relative bias and an encoder": ModelConfig(
        encoder=STACK,
        decoder=dataclasses.replace(STACK, relative_bias_per_layer=True, relative_bias_bidirectional=False),
        vocab_size=tiny.VOCABULARY,
    ),
    "windows": ModelConfig(encoder=None, decoder=WINDOWS, vocab_size=tiny.VOCABULARY),
    "merged attention": ModelConfig(
        encoder=STACK,
        decoder=dataclasses.replace(WINDOWS, cross_attention="merged"),
        vocab_size=tiny.VOCABULARY,
    ),
    "disentangled positions": ModelConfig(
        encoder=None, decoder=dataclasses.replace(STACK, positions="disentangled"), vocab_size=tiny.VOCABULARY
    ),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("relative bias and an encoder", None),
        pytest.param("windows", "int8", marks=pytest.mark.slow),
        pytest.param("merged attention", None, marks=pytest.mark.slow),
        pytest.param("disentangled positions", None, marks=pytest.mark.slow),
    ],
)
def test_beams_read_their_past_where_it_was_written(name, dtype):
    """Beams are exchanged at random: the logits equal those with caches whose rows are copied at each step."""
    config, count, steps = MODELS[name], 3, 9
    spec, random = abstract_model(config), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(0.0, 0.4, leaf.shape).astype(np.float32), spec.params)
    prompts, lengths = jnp.asarray(random.integers(2, 60, (2, 4)), jnp.int32), jnp.array([4, 2])

    @jax.jit
    def largest_difference(params, tokens_TxN, parents_TxRxB):
        model = bind_params(spec.graphdef, params)
        _, cache = read_prompts(model, prompts, lengths, steps + 1, cache_dtype=dtype)
        copied = jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), cache)
        first = jnp.arange(prompts.shape[0])[:, None] * count

        def step(caches, turn):
            kept, copied = caches
            tokens, parents = turn
            kept_logits, kept = model.decode(tokens[:, None], kept.follow_beams(parents))
            rows = (first + parents).reshape(-1)
            lengths, layers = jax.tree.map(lambda leaf: leaf[rows], (copied.lengths, copied.layers))
            copied_logits, copied = model.decode(tokens[:, None], copied._replace(lengths=lengths, layers=layers))
            return (kept, copied), (jnp.max(jnp.abs(kept_logits - copied_logits)), jnp.std(copied_logits))

        return jax.lax.scan(step, (cache.for_beams(count), copied), (tokens_TxN, parents_TxRxB))[1]

    tokens = random.integers(2, 60, (steps, 2 * count)).astype(np.int32)
    parents = random.integers(0, count, (steps, 2, count)).astype(np.int32)
    differences, spread = largest_difference(params, tokens, parents)
    # The products of the two differ by rounding, after which a slot of 8 bits can be one level off.
    tolerance = 1e-2 if dtype == "int8" else 1e-4
    assert np.max(differences) < tolerance * np.max(spread)
