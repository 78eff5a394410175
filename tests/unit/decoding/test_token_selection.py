"""Constraints and stop strings on the device against searches on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.decoding.constrained import FREE, Constraints
from t5x_like.decoding.sampling import Sampling
from t5x_like.decoding.stop_strings import FOUND, compile_stop_strings, cut_at_stop
from t5x_like.decoding.token_selection import (
    SelectionParams,
    advance,
    found_stop,
    initial_state,
    process_logits,
    sampling_logits,
    select_tokens,
)
from t5x_like.errors import ConfigError, DataError

EOS, TABLE = 1, 12
PIECES = [b"", b"", b"?", b"a", b"b", b"ab", b"ba", b"aab", b"\xc3", b"\xa9", b"bb"]


def selection_for(rows, sampling=None, **more):
    return SelectionParams(
        allowed=more.pop("allowed", jnp.ones(TABLE, bool)),
        sampling=(sampling or Sampling()).for_rows(rows),
        seeds_R=jnp.zeros(rows, jnp.uint32),
        rows_R=jnp.arange(rows),
        **more,
    )


def empty_prompts(rows):
    return jnp.zeros((rows, 1), jnp.int32), jnp.ones(rows, jnp.int32)


@pytest.mark.parametrize("stops", [["ab"], ["aba", "b"], ["bab", "abb", "aabaa"], ["é"], ["é", "abab", "bb?"]])
def test_stop_string_is_detected_in_the_step_that_completes_it(stops):
    """Random sequences of pieces: the automaton stops exactly where the text of the pieces contains a stop string."""
    table = compile_stop_strings(stops, PIECES, TABLE)
    rng = np.random.default_rng(0)
    for _ in range(60):
        tokens = rng.integers(0, len(PIECES), 14)
        state, text = 0, b""
        for token in tokens:
            state, text = int(table.next_SxV[state, token]), text + PIECES[token]
            assert (state == FOUND) == any(stop.encode() in text for stop in stops)
        cut, was_found = cut_at_stop(text, table.strings)
        assert was_found == (state == FOUND) and text.startswith(cut)
        if was_found:
            ends = min(text.find(stop.encode()) + len(stop.encode()) for stop in stops if stop.encode() in text)
            assert (
                max((s.encode() for s in stops if text[:ends].endswith(s.encode())), key=len) == text[len(cut) : ends]
            )
        else:
            assert cut == text


def test_invalid_stop_strings_are_refused():
    with pytest.raises(ConfigError, match="an empty string"):
        compile_stop_strings(["a", ""], PIECES, TABLE)
    with pytest.raises(ConfigError, match="600 bytes of stop strings"):
        compile_stop_strings(["a" * 600], PIECES, TABLE)


def test_row_stops_while_others_continue():
    selection = selection_for(2, stops_SxV=jnp.asarray(compile_stop_strings(["ab"], PIECES, TABLE).next_SxV))
    state = initial_state(selection, *empty_prompts(2), TABLE)
    seen = []
    for tokens in ([3, 4], [4, 4], [4, 3]):
        state = advance(jnp.array(tokens), selection, state)
        seen.append(found_stop(state).tolist())
    assert seen == [[False, False], [True, False], [True, False]] and state.num_selected_R.tolist() == [3, 3]


def sequences(automaton, first, length):
    """Return all sequences of at most `length` tokens that the automaton accepts."""
    result, todo = set(), [((), first)]
    while todo:
        tokens, state = todo.pop()
        for token in np.flatnonzero(automaton.allowed(jnp.array([state]), TABLE)[0]).tolist():
            if token == EOS:
                result.add(tokens)
            elif len(tokens) < length:
                todo.append(((*tokens, token), int(automaton.advance(jnp.array([state]), jnp.array([token]))[0])))
    return result


def test_automaton_accepts_exactly_its_choices():
    choices, others = [(3,), (3, 4), (3, 4, 5), (6, 4), (11,)], [(4,), (3, 3)]
    constraints = Constraints(EOS)
    starts = [constraints.choices(one) for one in (choices, others, choices[::-1])]
    forced = constraints.forced([7, 8])
    automaton = constraints.automaton()
    assert starts[0] == starts[2] != starts[1]
    assert sequences(automaton, starts[0], 5) == set(choices) and sequences(automaton, starts[1], 5) == set(others)
    assert sequences(automaton, forced, 3) == {(7, 8), *((7, 8, token) for token in range(TABLE) if token != EOS)}
    assert constraints.forced([]) == FREE and automaton.allowed(jnp.array([FREE]), TABLE).all()
    for wrong in ([], [[]], [[3], []]):
        with pytest.raises(DataError, match="expected one or more choices"):
            constraints.choices(wrong)


def test_draws_satisfy_masks_and_constraints_of_each_row():
    rows = 64
    constraints = Constraints(EOS)
    starts = [constraints.choices(one) for one in ([(3, 4), (3, 5), (6,)], [(7, 7, 7)])] * (rows // 2)
    allowed = jnp.ones((rows, TABLE), bool).at[::4, 5].set(False)
    machine = {"automaton": constraints.automaton(), "start_state_R": jnp.asarray(starts)}
    selection = selection_for(rows, Sampling(temperature=5.0), allowed=allowed, **machine)
    state = initial_state(selection, *empty_prompts(rows), TABLE)
    step = jax.jit(lambda logits, state: select_tokens(logits, selection, state))
    logits = jax.random.normal(jax.random.key(0), (5, rows, TABLE))
    built = []
    for number in range(5):
        token_R, _, state = step(logits[number], state)
        built.append(np.asarray(token_R))
    texts = ["".join(map(str, row[: row.index(EOS)])) for row in np.stack(built, axis=1).tolist()]
    assert set(texts[0::4]) == {"34", "6"} and set(texts[2::4]) == {"34", "35", "6"} and set(texts[1::2]) == {"777"}


def test_penalty_applies_to_read_and_generated_tokens():
    selection = selection_for(2, Sampling(repetition_penalty=2.0), allowed=jnp.ones(TABLE, bool).at[0].set(False))
    state = initial_state(selection, jnp.array([[0, 3, 9], [0, 4, 0]]), jnp.array([3, 2]), TABLE)
    state = advance(jnp.array([5, 6]), selection, state)
    result = np.asarray(process_logits(jnp.ones((2, TABLE)), selection, state))
    halves = [np.flatnonzero(row == 0.5).tolist() for row in result]
    assert halves == [[3, 5, 9], [4, 6]] and (result[:, 0] == -np.inf).all()
    drawn_from = sampling_logits(jnp.asarray(result), selection, state._replace(seen_RxV=None))
    probability = jax.nn.softmax(drawn_from, axis=-1)
    assert probability.max(axis=-1).tolist() == [1.0, 1.0] == probability.sum(axis=-1).tolist()


def test_penalty_and_warpers_equal_those_of_transformers():
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers").generation.logits_process
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (4, 40)).astype(np.float32)
    read = rng.integers(0, 40, (4, 9))
    reference = torch.tensor(logits)
    for processor in (
        processors.RepetitionPenaltyLogitsProcessor(1.7),
        processors.TemperatureLogitsWarper(0.8),
        processors.TopKLogitsWarper(25),
        processors.TopPLogitsWarper(0.93),
        processors.MinPLogitsWarper(0.04),
    ):
        reference = processor(torch.tensor(read), reference)
    selection = SelectionParams(
        jnp.ones(40, bool),
        Sampling(temperature=0.8, top_k=25, top_p=0.93, min_p=0.04, repetition_penalty=1.7).for_rows(4),
        jnp.zeros(4, jnp.uint32),
        jnp.arange(4),
    )
    actual = sampling_logits(
        jnp.asarray(logits), selection, initial_state(selection, jnp.asarray(read), jnp.full(4, 9), 40)
    )
    np.testing.assert_allclose(np.asarray(actual), reference.numpy(), rtol=1e-5)
    assert 4 < np.isfinite(actual).sum() < 60
