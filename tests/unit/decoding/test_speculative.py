"""Speculative decoding has the distribution of decoding without a draft, and the same tokens if it is greedy.

Distributions are compared with small Markov chains, which are known exactly, and then with models and their caches.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.config_examples import example
from helpers.model_examples import EXAMPLES, VOCABULARY, model, parameters
from scipy import stats

from t5x_like.decoding import speculative, token_selection
from t5x_like.decoding.constrained import Constraints
from t5x_like.decoding.engine import generate_tokens, speculative_tokens
from t5x_like.decoding.sampling import Sampling
from t5x_like.decoding.speculative import Speculation, decode_speculatively, residual
from t5x_like.decoding.speculative.drafts import ModelDraft, PromptLookup
from t5x_like.decoding.token_selection import SelectionParams
from t5x_like.errors import ConfigError
from t5x_like.models.kv_cache import KVCache
from t5x_like.program import build_program

STATES = 16
ROWS = 60_000


def random_chain(seed, concentration=0.7, states=STATES):
    """Return a transition matrix: row s has the probabilities of the token after s."""
    return np.random.default_rng(seed).dirichlet(np.full(states, concentration), states)


def as_decode(chain_VxV):
    """Return a model whose next token depends on the newest token only."""
    log_VxV = jnp.log(jnp.asarray(chain_VxV, jnp.float32))

    def decode(tokens_RxT, cache, counts_R):
        return log_VxV[tokens_RxT], cache._replace(lengths=cache.lengths + counts_R)

    return decode


def empty(rows):
    return KVCache(lengths=jnp.zeros(rows, jnp.int32), layers=())


@functools.partial(jax.jit, static_argnames=("rows", "buffer_length", "count", "sampling", "limits", "end", "as_draft"))
def run(target, draft, seed, *, rows, buffer_length, count, sampling=None, limits=None, end=None, as_draft="model"):
    """Decode speculatively with two Markov chains; all rows begin after token 0."""
    size = target.shape[0]
    selection = SelectionParams(
        allowed=jnp.ones(size, bool),
        sampling=(sampling or Sampling(temperature=1.0)).for_rows(rows),
        seeds_R=jnp.full(rows, seed, jnp.uint32),
        rows_R=jnp.arange(rows),
    )
    start = jnp.zeros((rows, 1), jnp.int32)
    selection_state = token_selection.initial_state(selection, start, jnp.ones(rows, jnp.int32), size)
    lookup = PromptLookup(count)
    return decode_speculatively(
        as_decode(target),
        jnp.log(target[start[:, 0]]),
        empty(rows),
        selection=selection,
        selection_state=selection_state,
        ends=lambda tokens: tokens == (-1 if end is None else end),
        draft=ModelDraft(as_decode(draft), count) if as_draft == "model" else lookup,
        draft_state=empty(rows)
        if as_draft == "model"
        else lookup.start(start, jnp.ones(rows, jnp.int32), buffer_length),
        limits_R=jnp.full(rows, buffer_length if limits is None else limits, jnp.int32),
        buffer_length=buffer_length,
    )


def chains(seed=0):
    return jnp.asarray(random_chain(seed), jnp.float32), jnp.asarray(random_chain(seed + 1), jnp.float32)


def p_value_of_pairs(target, tokens_RxN):
    """Return the p-value of the joint counts of the second and third token under the target's chain.

    The second token follows the first, which is drawn without speculation.
    """
    first, second, third = (np.asarray(tokens_RxN)[:, index] for index in range(3))
    transitions = np.asarray(target, np.float64)
    transitions /= transitions.sum(axis=1, keepdims=True)
    marginal = transitions[0] @ transitions
    expected = (marginal[:, None] * transitions).reshape(-1) * len(first)
    counts = np.bincount(second * STATES + third, minlength=STATES**2)
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    return stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue


@pytest.mark.parametrize("as_draft", ["model", "lookup"])
@pytest.mark.parametrize("greedy", [True, False])
def test_token_whose_logits_are_not_finite_ends_its_row_in_place_of_a_token(greedy, as_draft):
    """State 3 has no distribution: a row has `NOT_FINITE` after its first 3 and nothing after that."""
    target = chains()[0].at[3].set(jnp.nan)
    sampling = Sampling(temperature=0.0 if greedy else 1.0)
    settings = dict(rows=64, buffer_length=12, count=3, sampling=sampling, as_draft=as_draft)
    result = run(target, chains()[1], 0, **settings)
    tokens, counts = np.asarray(result.tokens_RxN), np.asarray(result.num_new_R)
    assert greedy or (tokens == -1).any() and (counts == 12).any(), "both cases occur"
    for row, count in zip(tokens.tolist(), counts, strict=True):
        state, expected = 0, []
        for token in row[:count]:
            expected.append(-1 if state == 3 else token)
            state = token
        assert row[:count] == expected and -1 not in row[: count - 1]
        assert count == 12 or row[count - 1] == -1
        assert not any(row[count:])
    first = run(target.at[0].set(jnp.nan), chains()[1], 0, **settings)
    assert (np.asarray(first.tokens_RxN)[:, 0] == -1).all() and (np.asarray(first.num_new_R) == 1).all()


@pytest.mark.parametrize("seed", range(20))
def test_accepted_and_replacement_probabilities_add_up_to_the_target(seed):
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
def test_sum_over_all_paths_is_the_joint_distribution_of_the_target(count):
    """Enumerate all ways to propose, accept and replace up to three tokens, with their probabilities."""
    size, length = 4, 3
    target, draft = random_chain(5, states=size), random_chain(6, states=size)
    with jax.enable_x64(True):
        replacements = np.asarray(jax.nn.softmax(jax.vmap(residual)(jnp.log(target), jnp.log(draft))))

    def passes(text, probability):
        """Yield the possible texts after one pass that continues `text`, with probabilities."""
        for proposal in itertools.product(range(size), repeat=count):
            way, newest, kept = probability, text[-1], text
            for token in proposal:
                drawn = way * draft[newest, token]
                keep = min(1.0, target[newest, token] / draft[newest, token])
                for other in range(size):
                    yield (
                        (*kept, other),
                        drawn * _rest(draft, proposal, kept, text) * (1 - keep) * replacements[newest, other],
                    )
                way, newest, kept = drawn * keep, token, (*kept, token)
            for other in range(size):
                yield (*kept, other), way * target[newest, other]

    def _rest(draft, proposal, kept, text):
        """Return the probability of the proposals after the rejected one, which have no effect."""
        rejected = len(kept) - len(text)
        newest, rest = proposal[rejected], 1.0
        for token in proposal[rejected + 1 :]:
            rest, newest = rest * draft[newest, token], token
        return rest

    answers, open_texts = np.zeros((size,) * length), {(0,): 1.0}
    while open_texts:
        following = {}
        for text, probability in open_texts.items():
            for longer, share in passes(text, probability):
                if len(longer) > length:
                    answers[longer[1 : length + 1]] += share
                else:
                    following[longer] = following.get(longer, 0.0) + share
        open_texts = following
    joint = np.einsum("a,ab,bc->abc", target[0], target, target)
    np.testing.assert_allclose(answers, joint, atol=1e-12)


def test_joint_distribution_of_draws_is_that_of_the_target():
    target, draft = chains()
    for attempt in range(2):  # Both fail once in a million.
        result = run(target, draft, attempt, rows=ROWS, buffer_length=4, count=3)
        if p_value_of_pairs(target, result.tokens_RxN) > 1e-3:
            return
    pytest.fail("the tokens do not have the distribution of the target")


@pytest.mark.slow
def test_goodness_of_fit_detects_a_wrong_replacement_distribution(monkeypatch):
    """Replacements drawn from p instead of the residual: the acceptance rate is the same, the distribution is not."""
    target, draft = chains()
    right = run(target, draft, 0, rows=ROWS, buffer_length=4, count=3)
    monkeypatch.setattr(speculative, "residual", lambda log_p, log_q: log_p)
    wrong = run.__wrapped__(target, draft, 0, rows=ROWS, buffer_length=4, count=3)
    assert p_value_of_pairs(target, wrong.tokens_RxN) < 1e-12
    rates = [float(np.mean(np.asarray(one.num_new_R) / np.asarray(one.passes_R))) for one in (right, wrong)]
    assert abs(rates[0] - rates[1]) < 0.05


def test_prompt_lookup_has_the_same_distribution():
    target, draft = chains(3)
    for attempt in range(2):
        result = run(target, draft, attempt, rows=ROWS, buffer_length=4, count=2, as_draft="lookup")
        if p_value_of_pairs(target, result.tokens_RxN) > 1e-3:
            return
    pytest.fail("the tokens do not have the distribution of the target")


def test_sampling_settings_apply_to_target_and_draft():
    """With top-k, the result follows the truncated and renormalized target."""
    target, draft = chains(7)
    sampling = Sampling(temperature=1.0, top_k=4)
    result = run(target, draft, 1, rows=20_000, buffer_length=4, count=3, sampling=sampling)
    tokens = np.asarray(result.tokens_RxN)
    best = np.argsort(-np.asarray(target), axis=1)[:, :4]
    for index in range(3):
        assert all(
            token in best[newest] for newest, token in set(zip(tokens[:, index], tokens[:, index + 1], strict=True))
        )
    cut = np.where(np.isin(np.arange(STATES), best[0]), np.asarray(target)[0], 0)
    counts = np.bincount(tokens[:, 0], minlength=STATES)[best[0]]
    assert stats.chisquare(counts, len(tokens) * cut[best[0]] / cut.sum()).pvalue > 1e-4


def test_target_as_its_own_draft_accepts_everything():
    target, _ = chains()
    result = run(target, target, 0, rows=64, buffer_length=13, count=3)
    # The first token comes from the prefill; each pass then gives four.
    np.testing.assert_array_equal(result.passes_R, 3)
    np.testing.assert_array_equal(result.num_new_R, 13)


def test_disjoint_distributions_give_one_token_per_pass():
    halves = np.zeros((2, STATES, STATES))
    halves[0, :, :8], halves[1, :, 8:] = 1 / 8, 1 / 8
    result = run(jnp.asarray(halves[0]), jnp.asarray(halves[1]), 0, rows=64, buffer_length=9, count=3)
    np.testing.assert_array_equal(result.passes_R, 8)
    assert np.asarray(result.tokens_RxN).max() < 8


@pytest.mark.slow
@pytest.mark.parametrize("as_draft", ["model", "lookup"])
def test_greedy_rows_end_at_eos_and_at_their_limit(as_draft):
    """A chain that counts up, with EOS among the proposals, and limits that proposals would exceed."""
    count_up = np.full((STATES, STATES), 1e-6)
    count_up[np.arange(STATES), (np.arange(STATES) + 1) % STATES] = 1
    chain = jnp.asarray(count_up)
    greedy = Sampling()
    for limit, expected in [(1, [1]), (3, [1, 2, 3]), (6, [1, 2, 3, 4, 5]), (16, [1, 2, 3, 4, 5])]:
        result = run(
            chain, chain, 0, rows=2, buffer_length=16, count=4, sampling=greedy, limits=limit, end=5, as_draft=as_draft
        )
        for row in np.asarray(result.tokens_RxN):
            assert row[: len(expected)].tolist() == expected and not row[len(expected) :].any()
        np.testing.assert_array_equal(result.num_new_R, len(expected))


def test_prompt_lookup_proposes_tokens_after_the_longest_match():
    lookup = PromptLookup(3, longest=2)
    prompts = jnp.array(
        [[7, 1, 5, 9, 8, 1, 6, 4, 2, 7], [3, 3, 3, 3, 0, 0, 0, 0, 0, 0], [1, 2, 4, 1, 2, 5, 6, 8, 1, 0]]
    )
    state = lookup.start(prompts, jnp.array([10, 4, 9]), buffer_length=4)
    proposal, state = lookup.propose(state, jnp.array([1, 3, 2]), jnp.ones(3, jnp.int32), None, None)
    # The match "7 1" is longer than the later "1"; of two matches "1 2" the later one is used.
    assert proposal.tokens_RxG[0].tolist() == [5, 9, 8] and proposal.tokens_RxG[2].tolist() == [5, 6, 8]
    assert proposal.tokens_RxG[1, 0] == 3
    state = lookup.keep(state, jnp.array([[1, 5, 9, 8], [3, 3, 3, 3], [2, 5, 0, 0]]), jnp.array([3, 0, 2]))
    assert state.lengths_R.tolist() == [13, 4, 11]
    assert state.tokens_RxL[0, 9:13].tolist() == [7, 1, 5, 9] and state.tokens_RxL[2, 8:11].tolist() == [1, 2, 5]


def program_of(name, config, layout):
    run = dataclasses.replace(example(layout), model=config)
    program = build_program(run, jax.devices()[:1])
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
    """Return the model with noise on its parameters, some of whose proposals are accepted."""
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


# Greedy decoding with every model; the other settings with two of them.
WAYS_OF_MODELS = [(name, "greedy") for name in MODELS]
WAYS_OF_MODELS += [(name, way) for name in ("decoder", "encoder_decoder") for way in WAYS if way != "greedy"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), WAYS_OF_MODELS)
def test_greedy_tokens_equal_those_without_a_draft(name, way):
    """Rows accept different numbers of tokens, so each cache is truncated to its own length."""
    program, params = opened(name)
    common = {"allowed_V": ALLOWED, "max_new_tokens": 13, "bidirectional": name == "prefix_lm"} | WAYS[way]
    expected = generate_tokens(program, params, PROMPTS, **common)
    assert any(expected)
    for draft in (None, draft_of(name, 0.02)):
        answers, passes = speculative_tokens(program, params, PROMPTS, speculation=Speculation(3, draft), **common)
        assert answers == expected
        assert 0 < passes.passes <= passes.tokens or passes.tokens == 0


@pytest.mark.slow
def test_proposals_of_the_model_itself_are_always_accepted():
    program, params = opened("encoder_decoder")
    common = {"allowed_V": ALLOWED, "max_new_tokens": 13, "speculation": Speculation(3, (program, params))}
    answers, passes = speculative_tokens(program, params, PROMPTS, **common)
    longest = sum(-(-(len(answer) - 1) // 4) for answer in answers if len(answer) == 13)
    assert passes.passes <= longest + sum(len(answer) // 4 + 1 for answer in answers if len(answer) < 13)
    sampled, drawn = speculative_tokens(program, params, PROMPTS, sampling=Sampling(temperature=1.0), seed=4, **common)
    assert drawn.passes <= sum(len(answer) // 4 + 1 for answer in sampled)


def test_draft_with_another_vocabulary_is_refused():
    program, params = opened("decoder")
    other = dataclasses.replace(MODELS["decoder"][0], vocab_size=64)
    wrong = program_of("other", other, "causal_lm")
    with pytest.raises(ConfigError, match="the draft's vocab_size"):
        common = {"allowed_V": ALLOWED, "max_new_tokens": 3}
        speculative_tokens(program, params, PROMPTS, speculation=Speculation(3, wrong), **common)
