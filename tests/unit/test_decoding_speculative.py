"""Speculative decoding: distributed as without a draft, token for token the same where greedy.

The laws are held against small Markov chains, of which everything is known, and then against models with their caches.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from config_examples import example
from model_examples import EXAMPLES, VOCABULARY, model, parameters
from scipy import stats

from t5x_like.config import ConfigError
from t5x_like.decoding import choosing, speculative
from t5x_like.decoding.choosing import Rules
from t5x_like.decoding.constraints import Constraints
from t5x_like.decoding.drafts import ModelDraft, PromptLookup
from t5x_like.decoding.generate import generate_tokens, speculative_tokens
from t5x_like.decoding.sampling import Sampling
from t5x_like.decoding.speculative import Speculation, decode_speculatively, residual
from t5x_like.models.cache import Cache
from t5x_like.program import assemble

STATES = 16
ROWS = 60_000


def random_chain(seed, concentration=0.7, states=STATES):
    """Row s: probabilities of the token behind s."""
    return np.random.default_rng(seed).dirichlet(np.full(states, concentration), states)


def as_decode(chain_VxV):
    """A model whose next token depends on the newest alone."""
    log_VxV = jnp.log(jnp.asarray(chain_VxV, jnp.float32))

    def decode(tokens_RxT, cache, counts_R):
        return log_VxV[tokens_RxT], cache._replace(lengths=cache.lengths + counts_R)

    return decode


def empty(rows):
    return Cache(lengths=jnp.zeros(rows, jnp.int32), layers=())


@functools.partial(jax.jit, static_argnames=("rows", "cells", "count", "sampling", "limits", "end", "as_draft"))
def run(target, draft, seed, *, rows, cells, count, sampling=None, limits=None, end=None, as_draft="model"):
    """Speculates with two chains; all rows begin behind token 0."""
    size = target.shape[0]
    rules = Rules(
        allowed=jnp.ones(size, bool),
        sampling=(sampling or Sampling(temperature=1.0)).rows(rows),
        seeds_R=jnp.full(rows, seed, jnp.uint32),
        rows_R=jnp.arange(rows),
    )
    start = jnp.zeros((rows, 1), jnp.int32)
    chooser = choosing.start(rules, start, jnp.ones(rows, jnp.int32), size)
    lookup = PromptLookup(count)
    return decode_speculatively(
        as_decode(target),
        jnp.log(target[start[:, 0]]),
        empty(rows),
        rules=rules,
        chooser=chooser,
        ends=lambda tokens: tokens == (-1 if end is None else end),
        draft=ModelDraft(as_decode(draft), count) if as_draft == "model" else lookup,
        draft_state=empty(rows) if as_draft == "model" else lookup.start(start, jnp.ones(rows, jnp.int32), cells),
        limits_R=jnp.full(rows, cells if limits is None else limits, jnp.int32),
        cells=cells,
    )


def chains(seed=0):
    return jnp.asarray(random_chain(seed), jnp.float32), jnp.asarray(random_chain(seed + 1), jnp.float32)


def p_value_of_pairs(target, tokens_RxN):
    """Of the second and third token jointly, under the target's chain; the second follows the first, which is drawn
    plainly."""
    first, second, third = (np.asarray(tokens_RxN)[:, place] for place in range(3))
    law = np.asarray(target, np.float64)
    law /= law.sum(axis=1, keepdims=True)
    marginal = law[0] @ law
    expected = (marginal[:, None] * law).reshape(-1) * len(first)
    counts = np.bincount(second * STATES + third, minlength=STATES**2)
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    return stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue


@pytest.mark.parametrize("seed", range(20))
def test_what_is_kept_and_what_takes_its_place_add_up_to_the_target(seed):
    random = np.random.default_rng(seed)
    p, q = random.dirichlet(np.full(8, 0.3), 2)
    zeros = random.random((2, 8)) < 0.3
    p, q = np.where(zeros[0], 0, p), np.where(zeros[1], 0, q)
    p, q = p / p.sum(), q / q.sum()
    with jax.enable_x64(True), np.errstate(divide="ignore"):
        more = np.asarray(jax.nn.softmax(residual(jnp.log(jnp.asarray(p)), jnp.log(jnp.asarray(q)))))
    kept = np.minimum(p, q)
    np.testing.assert_allclose(kept + (1 - kept.sum()) * more, p, atol=1e-9)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_all_paths_together_have_the_targets_joint_probabilities(count):
    """Every way to propose, keep and replace, with its probability, up to three tokens."""
    size, length = 4, 3
    target, draft = random_chain(5, states=size), random_chain(6, states=size)
    with jax.enable_x64(True):
        behind = np.asarray(jax.nn.softmax(jax.vmap(residual)(jnp.log(target), jnp.log(draft))))

    def passes(text, probability):
        """One pass behind `text`: what it may become, with probabilities."""
        for proposal in itertools.product(range(size), repeat=count):
            way, newest, kept = probability, text[-1], text
            for token in proposal:
                drawn = way * draft[newest, token]
                keep = min(1.0, target[newest, token] / draft[newest, token])
                for other in range(size):
                    yield (
                        (*kept, other),
                        drawn * _rest(draft, proposal, kept, text) * (1 - keep) * behind[newest, other],
                    )
                way, newest, kept = drawn * keep, token, (*kept, token)
            for other in range(size):
                yield (*kept, other), way * target[newest, other]

    def _rest(draft, proposal, kept, text):
        """Probability of the proposals that nobody looks at any more, behind the one that is rejected."""
        place = len(kept) - len(text)
        newest, rest = proposal[place], 1.0
        for token in proposal[place + 1 :]:
            rest, newest = rest * draft[newest, token], token
        return rest

    found, open_texts = np.zeros((size,) * length), {(0,): 1.0}
    while open_texts:
        following = {}
        for text, probability in open_texts.items():
            for longer, share in passes(text, probability):
                if len(longer) > length:
                    found[longer[1 : length + 1]] += share
                else:
                    following[longer] = following.get(longer, 0.0) + share
        open_texts = following
    joint = np.einsum("a,ab,bc->abc", target[0], target, target)
    np.testing.assert_allclose(found, joint, atol=1e-12)


def test_joint_distribution_of_what_is_drawn():
    target, draft = chains()
    for attempt in range(2):  # Once in a million, both.
        result = run(target, draft, attempt, rows=ROWS, cells=4, count=3)
        if p_value_of_pairs(target, result.tokens_RxN) > 1e-3:
            return
    pytest.fail("the tokens are not distributed as the target says")


def test_the_test_notices_a_replacement_from_the_wrong_distribution(monkeypatch):
    """What is drawn from p in place of the residual is accepted as often, so that no rate shows it."""
    target, draft = chains()
    right = run(target, draft, 0, rows=ROWS, cells=4, count=3)
    monkeypatch.setattr(speculative, "residual", lambda log_p, log_q: log_p)
    wrong = run.__wrapped__(target, draft, 0, rows=ROWS, cells=4, count=3)
    assert p_value_of_pairs(target, wrong.tokens_RxN) < 1e-12
    rates = [float(np.mean(np.asarray(one.made_R) / np.asarray(one.passes_R))) for one in (right, wrong)]
    assert abs(rates[0] - rates[1]) < 0.05


def test_lookup_has_the_same_law():
    target, draft = chains(3)
    for attempt in range(2):
        result = run(target, draft, attempt, rows=ROWS, cells=4, count=2, as_draft="lookup")
        if p_value_of_pairs(target, result.tokens_RxN) > 1e-3:
            return
    pytest.fail("the tokens are not distributed as the target says")


def test_settings_hold_for_both():
    """Of top-k, what comes out is the target cut and made to add up to 1 again."""
    target, draft = chains(7)
    sampling = Sampling(temperature=1.0, top_k=4)
    result = run(target, draft, 1, rows=20_000, cells=4, count=3, sampling=sampling)
    tokens = np.asarray(result.tokens_RxN)
    best = np.argsort(-np.asarray(target), axis=1)[:, :4]
    for place in range(3):
        assert all(
            token in best[newest] for newest, token in set(zip(tokens[:, place], tokens[:, place + 1], strict=True))
        )
    cut = np.where(np.isin(np.arange(STATES), best[0]), np.asarray(target)[0], 0)
    counts = np.bincount(tokens[:, 0], minlength=STATES)[best[0]]
    assert stats.chisquare(counts, len(tokens) * cut[best[0]] / cut.sum()).pvalue > 1e-4


def test_the_target_as_its_own_draft_keeps_everything():
    target, _ = chains()
    result = run(target, target, 0, rows=64, cells=13, count=3)
    # The first token comes with the prompt; each pass then gives four.
    np.testing.assert_array_equal(result.passes_R, 3)
    np.testing.assert_array_equal(result.made_R, 13)


def test_disjoint_distributions_give_one_token_per_pass():
    halves = np.zeros((2, STATES, STATES))
    halves[0, :, :8], halves[1, :, 8:] = 1 / 8, 1 / 8
    result = run(jnp.asarray(halves[0]), jnp.asarray(halves[1]), 0, rows=64, cells=9, count=3)
    np.testing.assert_array_equal(result.passes_R, 8)
    assert np.asarray(result.tokens_RxN).max() < 8


@pytest.mark.parametrize("as_draft", ["model", "lookup"])
def test_greedy_rows_end_where_they_should(as_draft):
    """A chain that counts up: with an end among the proposals, and limits that proposals would exceed."""
    count_up = np.full((STATES, STATES), 1e-6)
    count_up[np.arange(STATES), (np.arange(STATES) + 1) % STATES] = 1
    chain = jnp.asarray(count_up)
    greedy = Sampling()
    for limit, expected in [(1, [1]), (3, [1, 2, 3]), (6, [1, 2, 3, 4, 5]), (16, [1, 2, 3, 4, 5])]:
        result = run(
            chain, chain, 0, rows=2, cells=16, count=4, sampling=greedy, limits=limit, end=5, as_draft=as_draft
        )
        for row in np.asarray(result.tokens_RxN):
            assert row[: len(expected)].tolist() == expected and not row[len(expected) :].any()
        np.testing.assert_array_equal(result.made_R, len(expected))


def test_lookup_proposes_what_followed_the_longest_match():
    lookup = PromptLookup(3, longest=2)
    prompts = jnp.array(
        [[7, 1, 5, 9, 8, 1, 6, 4, 2, 7], [3, 3, 3, 3, 0, 0, 0, 0, 0, 0], [1, 2, 4, 1, 2, 5, 6, 8, 1, 0]]
    )
    state = lookup.start(prompts, jnp.array([10, 4, 9]), cells=4)
    proposal, state = lookup.propose(state, jnp.array([1, 3, 2]), jnp.ones(3, jnp.int32), None, None)
    # "7 1" beats the later "1"; of two "1 2" the later counts.
    assert proposal.tokens_RxG[0].tolist() == [5, 9, 8] and proposal.tokens_RxG[2].tolist() == [5, 6, 8]
    assert proposal.tokens_RxG[1, 0] == 3
    state = lookup.keep(state, jnp.array([[1, 5, 9, 8], [3, 3, 3, 3], [2, 5, 0, 0]]), jnp.array([3, 0, 2]))
    assert state.lengths_R.tolist() == [13, 4, 11]
    assert state.tokens_RxL[0, 9:13].tolist() == [7, 1, 5, 9] and state.tokens_RxL[2, 8:11].tolist() == [1, 2, 5]


def program_of(name, config, layout):
    run = dataclasses.replace(example(layout), model=config)
    program = assemble(run, jax.devices()[:1])
    return program, parameters(config, seed=3)


MODELS = {
    "decoder": (model("decoder", "rope"), "causal_lm"),
    "prefix_lm": (model("prefix_lm"), "prefix_lm"),
    "encoder_decoder": (model("encoder_decoder"), "encoder_decoder"),
    "windows": (EXAMPLES["local"], "causal_lm"),
    "merged": (EXAMPLES["merged"], "encoder_decoder"),
    "learned": (model("decoder", "learned"), "causal_lm"),
}
ALLOWED = np.arange(VOCABULARY) > 0
PROMPTS = [[5, 9, 33, 7, 9, 33], [8], [12, 40, 41, 42, 3, 3, 3, 17, 12, 40, 41], [60, 2]]


@functools.cache
def opened(name):
    return program_of(name, *MODELS[name])


def draft_of(name, noise):
    """The model itself with noise on its parameters: right now and then."""
    program, params = opened(name)
    random = np.random.default_rng(1)
    return program, jax.tree.map(lambda leaf: leaf + noise * random.normal(size=leaf.shape).astype(np.float32), params)


CONSTRAINTS = Constraints(1)
CHOSEN = CONSTRAINTS.choices([[7, 8, 9, 10, 11], [7, 8, 12], [30]])
WAYS = {
    "greedy": {},
    "penalty and limits": {"sampling": Sampling(repetition_penalty=1.5), "max_new_tokens": [3, 11, 1, 7]},
    "int8": {"cache_dtype": "int8"},
    "choices": {"automaton": CONSTRAINTS.automaton(), "start_states": [CHOSEN] * 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_are_those_without_a_draft(name, way):
    """Rows keep different numbers of tokens, so that each cache is rolled back by itself."""
    if way != "greedy" and name not in ("decoder", "encoder_decoder"):
        pytest.skip("this way is tried with two models")
    program, params = opened(name)
    common = {"allowed_V": ALLOWED, "max_new_tokens": 13, "bidirectional": name == "prefix_lm"} | WAYS[way]
    expected = generate_tokens(program, params, PROMPTS, **common)
    assert any(expected)
    for draft in (None, draft_of(name, 0.02)):
        found, passes = speculative_tokens(program, params, PROMPTS, speculation=Speculation(3, draft), **common)
        assert found == expected
        assert 0 < passes.passes <= passes.tokens or passes.tokens == 0


@pytest.mark.slow
def test_the_model_as_its_own_draft_is_always_right():
    program, params = opened("encoder_decoder")
    common = {"allowed_V": ALLOWED, "max_new_tokens": 13, "speculation": Speculation(3, (program, params))}
    found, passes = speculative_tokens(program, params, PROMPTS, **common)
    longest = sum(-(-(len(answer) - 1) // 4) for answer in found if len(answer) == 13)
    assert passes.passes <= longest + sum(len(answer) // 4 + 1 for answer in found if len(answer) < 13)
    sampled, drawn = speculative_tokens(program, params, PROMPTS, sampling=Sampling(temperature=1.0), seed=4, **common)
    assert drawn.passes <= sum(len(answer) // 4 + 1 for answer in sampled)


def test_a_draft_of_another_vocabulary_is_refused():
    program, params = opened("decoder")
    other = dataclasses.replace(MODELS["decoder"][0], vocab_size=64)
    wrong = program_of("other", other, "causal_lm")
    with pytest.raises(ConfigError, match="the draft's vocab_size"):
        common = {"allowed_V": ALLOWED, "max_new_tokens": 3}
        speculative_tokens(program, params, PROMPTS, speculation=Speculation(3, wrong), **common)
