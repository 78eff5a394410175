"""Log-likelihoods against the plain forward pass of one row at a time."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from helpers import decoding_examples as tiny

from t5x_like.config import ShardingConfig
from t5x_like.decoding import log_likelihood
from t5x_like.decoding.engine import generate_tokens
from t5x_like.decoding.log_likelihood import score_stream, score_tokens
from t5x_like.errors import ConfigError, DataError
from t5x_like.program import build_program

SLOW = pytest.mark.slow
PAIRS = [
    ([5, 9, 33, 7, 1], [4, 4, 60]),
    ([8], [7]),
    ([12, 40, 41, 42, 3, 3, 3, 17, 20, 21, 50, 51, 52, 53, 54, 55, 56, 1], [2, 9, 9, 0, 11]),
    ([60, 2], []),
    ([60, 2], [31, 63, 5, 6, 7, 8, 9]),
]


@functools.cache
def plain_logits(layout):
    program, _ = tiny.untrained(layout, "rope")
    return jax.jit(lambda params, batch: program.model(params)(batch)[0])


def directly(layout, inputs, targets, *, bidirectional=False):
    """Return log p of each target from the logits of one row without segment ids, in double precision."""
    program, params = tiny.untrained(layout, "rope")
    config = program.run.model
    stream = (
        [config.decoder_start_token_id, *targets]
        if config.encoder
        else [config.decoder_start_token_id, *inputs, *targets]
    )

    def row(tokens):
        return np.pad(np.array(tokens, np.int32), (0, 32 - len(tokens)))[None]

    batch = {"decoder_input_tokens": row(stream[:-1])}
    if config.encoder:
        batch["encoder_input_tokens"] = row(inputs)
    elif bidirectional:
        batch["decoder_causal_attention"] = row([1] * (len(inputs) + 1))
    logits = np.asarray(plain_logits(layout)(params, batch), np.float64)[len(stream) - 1 - len(targets) :][
        : len(targets)
    ]
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return log_p[np.arange(len(targets)), targets], logits.argmax(axis=-1)


@pytest.mark.parametrize(
    "layout", ["encoder_decoder", pytest.param("prefix_lm", marks=SLOW), pytest.param("causal_lm", marks=SLOW)]
)
def test_scores_are_the_log_softmax_at_the_targets(layout):
    program, params = tiny.untrained(layout, "rope")
    bidirectional = layout == "prefix_lm"
    scores = score_tokens(program, params, PAIRS, bidirectional=bidirectional)
    for (inputs, targets), score in zip(PAIRS, scores, strict=True):
        if not targets:
            assert score == (0.0, (), True)
            continue
        expected, best = directly(layout, inputs, targets, bidirectional=bidirectional)
        np.testing.assert_allclose(score.per_token, expected, rtol=1e-4, atol=1e-4)
        assert score.sum == pytest.approx(sum(score.per_token), abs=1e-6)
        assert score.is_greedy == (best.tolist() == targets)


@pytest.mark.slow
def test_prefix_attention_is_bidirectional_only_on_request():
    program, params = tiny.untrained("prefix_lm")
    one, both = (score_tokens(program, params, PAIRS[:1], bidirectional=way)[0].sum for way in (False, True))
    assert abs(one - both) > 1e-3


@pytest.mark.slow
def test_only_the_greedy_continuation_is_greedy():
    program, params = tiny.untrained("causal_lm", "rope")
    everything = np.ones(tiny.VOCABULARY, bool)
    prompts = [inputs for inputs, _ in PAIRS]
    output = generate_tokens(program, params, prompts, allowed_V=everything, max_new_tokens=6)
    assert all(score.is_greedy for score in score_tokens(program, params, list(zip(prompts, output, strict=True))))
    other = [[*tokens[:-1], (tokens[-1] + 1) % tiny.VOCABULARY] for tokens in output if tokens]
    asked = [prompt for prompt, tokens in zip(prompts, output, strict=True) if tokens]
    assert not any(score.is_greedy for score in score_tokens(program, params, list(zip(asked, other, strict=True))))


@pytest.mark.slow
def test_scores_of_a_causal_stream_are_additive(monkeypatch):
    """log p(b, c | a) = log p(b | a) + log p(c | a, b); independent of the other rows and their number."""
    program, params = tiny.untrained("causal_lm", "rope")
    text = [9, 2, 33, 40, 40, 17, 5, 61, 12, 12, 3]
    (whole,) = score_tokens(program, params, [([], text)])
    parts = score_tokens(program, params, [(text[:cut], text[cut:]) for cut in range(len(text) + 1)])
    for cut, part in enumerate(parts):
        np.testing.assert_allclose(part.per_token, whole.per_token[cut:], rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(log_likelihood, "MAX_TOKENS_PER_BATCH", 32)
    seen = []
    alone = score_tokens(program, params, PAIRS, advance=seen.append)
    assert sum(seen) == 4 and len(seen) > 1
    monkeypatch.undo()
    for one, other in zip(alone, score_tokens(program, params, PAIRS), strict=True):
        np.testing.assert_allclose(one.per_token, other.per_token, rtol=1e-4, atol=1e-4)


def test_logits_of_a_long_stream_are_computed_in_chunks(monkeypatch):
    program, params = tiny.untrained("causal_lm", "rope")
    stream = np.random.default_rng(0).integers(2, 60, 19).tolist()
    whole = score_stream(program, params, stream)
    # 32 positions in chunks of at most 5, of which the last one is padded.
    monkeypatch.setattr(log_likelihood, "MAX_LOGITS_PER_BATCH", 5 * tiny.VOCABULARY + 1)
    shapes, logprobs_of = [], log_likelihood.logprobs_of

    def noted(logits, tokens):
        shapes.append(logits.shape)
        return logprobs_of(logits, tokens)

    monkeypatch.setattr(log_likelihood, "logprobs_of", noted)
    chunks = score_stream(program, params, stream)
    assert {shape[1] for shape in shapes} == {5}
    assert [entry.token for entry in chunks] == stream
    for found, expected in zip(chunks, whole, strict=True):
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-5)
        assert [token for token, _ in found.top] == [token for token, _ in expected.top]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["encoder_decoder", "prefix_lm"])
def test_scores_are_independent_of_the_mesh(layout):
    program, params = tiny.untrained(layout, "rope")
    run = dataclasses.replace(program.run, sharding=ShardingConfig(data=2, fsdp=2, tensor=2))
    split = build_program(run, jax.devices())
    placed = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), params, split.abstract_params)
    one, other = (score_tokens(*of, PAIRS, bidirectional=True) for of in ((program, params), (split, placed)))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a.per_token, b.per_token, rtol=1e-4, atol=1e-4)


def test_invalid_pairs_are_refused():
    program, params = tiny.untrained("encoder_decoder")
    with pytest.raises(DataError, match="pair 1: found no inputs"):
        score_tokens(program, params, [([3], [4]), ([], [4])])
    with pytest.raises(DataError, match="pair 0: found the id 64, expected one below 64"):
        score_tokens(program, params, [([64], [4])])
    program, params = tiny.untrained("causal_lm", "learned", max_positions=24)
    assert len(score_tokens(program, params, [([5] * 20, [6] * 4)])[0].per_token) == 4
    with pytest.raises(ConfigError, match="25 positions, expected at most 24"):
        score_tokens(program, params, [([5] * 20, [6] * 5)])
