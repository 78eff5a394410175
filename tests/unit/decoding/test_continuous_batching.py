"""Continuous batching: each request gets the tokens that it would get alone, and no new program is compiled."""

import dataclasses
import random
import threading
import time

import jax
import numpy as np
import pytest
from helpers.config_examples import example
from helpers.model_examples import VOCABULARY, model, parameters
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.decoding import continuous_batching, slots
from t5x_like.decoding.continuous_batching import Batcher, BatcherConfig
from t5x_like.decoding.engine import generate_tokens
from t5x_like.decoding.sampling import Sampling
from t5x_like.decoding.slot_requests import Request
from t5x_like.program import build_program

ALLOWED = np.arange(VOCABULARY) > 0
SETTINGS = [
    Sampling(),
    Sampling(temperature=0.9),
    Sampling(temperature=1.3, top_k=7),
    Sampling(temperature=0.7, top_p=0.8, repetition_penalty=1.4),
    Sampling(temperature=1.1, min_p=0.05),
]
ARCHITECTURES = ["decoder", "encoder_decoder", "prefix_lm"]
pytestmark = pytest.mark.slow


def batcher_of(architecture, **sizes):
    layout = "causal_lm" if architecture == "decoder" else architecture
    run = dataclasses.replace(example(layout), model=model(architecture, "rope"))
    program = build_program(run, jax.devices()[:1])
    return Batcher(
        program,
        parameters(run.model),
        allowed_V=ALLOWED,
        bidirectional=architecture == "prefix_lm",
        config=BatcherConfig(
            **{"slots": 3, "max_prompt_length": 20, "max_new_tokens": 12, "steps_per_sync": 2, "prefill_batch_size": 2}
            | sizes
        ),
    )


@pytest.fixture(scope="module", params=ARCHITECTURES)
def batcher(request):
    return batcher_of(request.param)


def requests_of(seed, count):
    """Return (request, its results) for requests of various sizes and settings."""
    draw = random.Random(seed)
    requests = []
    for row in range(count):
        result = {"tokens": [], "finish": None, "calls": 0}

        def take(tokens, finish, result=result):
            assert result["finish"] is None, "tokens after the end"
            result["tokens"] += tokens
            result["finish"], result["calls"] = finish, result["calls"] + 1

        prompt = [draw.randrange(2, VOCABULARY) for _ in range(draw.choice([1, 3, 8, 15, 16, 17, 20]))]
        sampling = draw.choice(SETTINGS)
        requests.append((Request(prompt, draw.randrange(1, 13), sampling, take, seed=seed, row=row), result))
    return requests


def expected(batcher, requests):
    """Return the tokens of each request by the batch engine, which decodes requests of equal settings together."""
    tokens_by_row = {}
    for sampling in SETTINGS:
        same_settings = [request for request, _ in requests if request.sampling == sampling]
        answers = generate_tokens(
            batcher.program,
            batcher.params,
            [request.prompt for request in same_settings],
            allowed_V=ALLOWED,
            max_new_tokens=12,
            bidirectional=batcher._settings.bidirectional,
            sampling=sampling,
            seed=requests[0][0].seed,
            rows=[request.row for request in same_settings],
        )
        cut = [answer[: request.max_new_tokens] for request, answer in zip(same_settings, answers, strict=True)]
        tokens_by_row |= {request.row: answer for request, answer in zip(same_settings, cut, strict=True)}
    return [tokens_by_row[request.row] for request, _ in requests]


def test_results_equal_those_of_the_batch_engine(batcher):
    batcher.warm_up()
    sizes = slots.decode_slots._cache_size(), slots.prefill_slots._cache_size()
    requests, draw = requests_of(1, 14), random.Random(5)
    pending = [request for request, _ in requests]
    while pending or batcher.num_waiting or batcher.num_active:
        for _ in range(min(draw.randrange(3), len(pending))):
            batcher.submit(pending.pop(0))
        batcher.run_once()
    for (request, result), tokens in zip(requests, expected(batcher, requests), strict=True):
        assert result["tokens"] == tokens
        ended = len(result["tokens"]) < request.max_new_tokens
        assert result["finish"] in (("stop",) if ended else ("stop", "length"))
    assert (slots.decode_slots._cache_size(), slots.prefill_slots._cache_size()) == sizes, "a program was compiled"


def test_cancelled_requests_free_their_slots_and_do_not_affect_others(batcher):
    requests, draw = requests_of(2, 18), random.Random(7)
    pending, cancelled = list(requests), []
    while pending or batcher.num_waiting or batcher.num_active:
        for _ in range(min(draw.randrange(4), len(pending))):
            batcher.submit(pending.pop(0)[0])
        running = [pair for pair in requests if pair not in pending and pair[1]["finish"] is None]
        if running and draw.random() < 0.3:
            cancelled.append(draw.choice(running))
            batcher.cancel(cancelled[-1][0])
        batcher.run_once()
    assert cancelled and batcher.num_active == batcher.num_waiting == 0
    for (_, result), tokens in zip(requests, expected(batcher, requests), strict=True):
        if result["finish"] == "cancelled":
            assert result["tokens"] == tokens[: len(result["tokens"])]
        else:
            assert result["tokens"] == tokens
    assert all(result["finish"] is not None for _, result in requests)


def test_requests_from_many_threads_are_answered_once(batcher):
    requests = requests_of(3, 12)
    thread = threading.Thread(target=batcher.run)
    thread.start()
    clients = [threading.Thread(target=batcher.submit, args=(request,)) for request, _ in requests]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    while any(result["finish"] is None for _, result in requests):
        assert thread.is_alive()
        time.sleep(0.01)
    batcher.close()
    thread.join(timeout=60)
    assert not thread.is_alive() and batcher.failure is None
    assert [result["tokens"] for _, result in requests] == expected(batcher, requests)
    with pytest.raises(ValueError, match="shutting down"):
        batcher.submit(requests[0][0])


def test_prompts_that_are_only_scored_do_not_delay_a_step_by_more_than_the_slots(monkeypatch):
    batcher = batcher_of("decoder")
    monkeypatch.setattr(continuous_batching, "score_stream", lambda *_: [])
    ((request, result),) = requests_of(2, 1)
    scored = []
    only_scored = [
        Request([2], 0, Sampling(), lambda *_: scored.append(1), on_prompt_logprobs=lambda _: None) for _ in range(9)
    ]
    batcher.submit_all([request, *only_scored])
    batcher.run_once()
    assert result["calls"] and len(scored) <= batcher.config.slots
    while batcher.num_waiting or batcher.num_active:
        batcher.run_once()
    assert len(scored) == 9 and result["finish"]


def test_unfinished_requests_are_cancelled_at_the_end():
    batcher = batcher_of("decoder")
    requests = requests_of(4, 5)
    batcher.submit_all([request for request, _ in requests])
    batcher.close()
    batcher.run()
    assert [result["finish"] for _, result in requests] == ["cancelled"] * 5


def test_request_whose_logits_are_not_finite_ends_in_an_error_and_others_go_on():
    batcher = batcher_of("decoder")
    requests, bad = requests_of(6, 6), VOCABULARY - 1
    for request, _ in requests:
        request.prompt = [token - (token == bad) for token in request.prompt]
    tokens = expected(batcher, requests)
    params = jax.tree.map(np.copy, parameters(batcher.program.run.model))
    params["token_embedder"]["embedding"][bad] = np.nan
    batcher = Batcher(batcher.program, params, allowed_V=ALLOWED, config=batcher.config)
    for request, _ in requests[::2]:
        request.prompt = [*request.prompt[1:], bad]
    batcher.submit_all([request for request, _ in requests])
    while batcher.num_waiting or batcher.num_active:
        batcher.run_once()
    assert [(result["tokens"], result["finish"]) for _, result in requests[::2]] == [([], "error")] * 3
    for (_, result), alone in zip(requests[1::2], tokens[1::2], strict=True):
        if bad in alone:
            assert (result["tokens"], result["finish"]) == (alone[: alone.index(bad) + 1], "error")
        else:
            assert result["tokens"] == alone and result["finish"] in ("stop", "length")


def test_failure_cancels_all_requests_and_is_recorded():
    batcher = batcher_of("decoder")
    requests = requests_of(4, 2)
    batcher.params = {"nothing": 0}
    batcher.submit_all([request for request, _ in requests])
    with pytest.raises(Exception):  # noqa: B017 - any exception
        batcher.run()
    assert batcher.failure is not None and [result["finish"] for _, result in requests] == ["cancelled"] * 2


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_requests_that_do_not_fit_are_refused_as_a_whole(batcher, data):
    prompt = data.draw(st.sampled_from([[], [3] * 21, [3] * 20, [5]]))
    limit = data.draw(st.sampled_from([0, -1, 13, 12]))
    good = Request([3], 1, Sampling(), lambda tokens, finish: None)
    if 0 < len(prompt) <= 20 and 0 < limit <= 12:
        return
    with pytest.raises(ValueError, match="expected 1 to"):
        batcher.submit_all([good, Request(prompt, limit, Sampling(), lambda tokens, finish: None)])
    assert batcher.num_waiting == 0
