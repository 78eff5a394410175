"""Continuous batching: each request gets what it would get alone, whoever comes and goes beside it, and nothing is
compiled anew."""

import dataclasses
import random
import threading
import time

import jax
import numpy as np
import pytest
from config_examples import example
from hypothesis import given, settings
from hypothesis import strategies as st
from model_examples import VOCABULARY, model, parameters

from t5x_like.decoding import continuous
from t5x_like.decoding.continuous import Batcher, Request, Sizes
from t5x_like.decoding.generate import generate_tokens
from t5x_like.decoding.sampling import Sampling
from t5x_like.program import assemble

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
    program = assemble(run, jax.devices()[:1])
    return Batcher(
        program,
        parameters(run.model),
        allowed_V=ALLOWED,
        bidirectional=architecture == "prefix_lm",
        sizes=Sizes(**{"slots": 3, "prompt_length": 20, "new_tokens": 12, "steps": 2, "admitted": 2} | sizes),
    )


@pytest.fixture(scope="module", params=ARCHITECTURES)
def batcher(request):
    return batcher_of(request.param)


def requests_of(seed, count):
    """Requests of all sizes and settings, and a list that their tokens go to."""
    draw = random.Random(seed)
    made = []
    for row in range(count):
        said = {"tokens": [], "finish": None, "calls": 0}

        def take(tokens, finish, said=said):
            assert said["finish"] is None, "something came behind the end"
            said["tokens"] += tokens
            said["finish"], said["calls"] = finish, said["calls"] + 1

        prompt = [draw.randrange(2, VOCABULARY) for _ in range(draw.choice([1, 3, 8, 15, 16, 17, 20]))]
        sampling = draw.choice(SETTINGS)
        made.append((Request(prompt, draw.randrange(1, 13), sampling, take, seed=seed, row=row), said))
    return made


def expected(batcher, made):
    """What each request gets alone: decoded by the batch engine, those of equal settings together."""
    found = {}
    for alike_in in SETTINGS:
        alike = [request for request, _ in made if request.sampling == alike_in]
        answers = generate_tokens(
            batcher.program,
            batcher.params,
            [request.prompt for request in alike],
            allowed_V=ALLOWED,
            max_new_tokens=12,
            bidirectional=batcher._how.bidirectional,
            sampling=alike_in,
            seed=made[0][0].seed,
            rows=[request.row for request in alike],
        )
        cut = [answer[: request.max_new_tokens] for request, answer in zip(alike, answers, strict=True)]
        found |= {request.row: answer for request, answer in zip(alike, cut, strict=True)}
    return [found[request.row] for request, _ in made]


def test_every_request_gets_what_it_would_get_alone(batcher):
    batcher.warm_up()
    sizes = continuous._step._cache_size(), continuous._read._cache_size()
    made, draw = requests_of(1, 14), random.Random(5)
    coming = [request for request, _ in made]
    while coming or batcher.waiting or batcher.taken:
        for _ in range(min(draw.randrange(3), len(coming))):
            batcher.submit(coming.pop(0))
        batcher.run_once()
    for (request, said), whole in zip(made, expected(batcher, made), strict=True):
        assert said["tokens"] == whole
        ended = len(said["tokens"]) < request.max_new_tokens
        assert said["finish"] in (("stop",) if ended else ("stop", "length"))
    assert (continuous._step._cache_size(), continuous._read._cache_size()) == sizes, "something was compiled"


def test_cancelled_requests_give_their_slots_back_and_disturb_nobody(batcher):
    made, draw = requests_of(2, 18), random.Random(7)
    coming, gone = list(made), []
    while coming or batcher.waiting or batcher.taken:
        for _ in range(min(draw.randrange(4), len(coming))):
            batcher.submit(coming.pop(0)[0])
        there = [one for one in made if one not in coming and one[1]["finish"] is None]
        if there and draw.random() < 0.3:
            gone.append(draw.choice(there))
            batcher.cancel(gone[-1][0])
        batcher.run_once()
    assert gone and batcher.taken == batcher.waiting == 0
    for (_, said), whole in zip(made, expected(batcher, made), strict=True):
        if said["finish"] == "cancelled":
            assert said["tokens"] == whole[: len(said["tokens"])]
        else:
            assert said["tokens"] == whole
    assert all(said["finish"] is not None for _, said in made)


def test_requests_from_many_threads_are_all_answered_once(batcher):
    made = requests_of(3, 12)
    thread = threading.Thread(target=batcher.run)
    thread.start()
    clients = [threading.Thread(target=batcher.submit, args=(request,)) for request, _ in made]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    while any(said["finish"] is None for _, said in made):
        assert thread.is_alive()
        time.sleep(0.01)
    batcher.close()
    thread.join(timeout=60)
    assert not thread.is_alive() and batcher.failure is None
    assert [said["tokens"] for _, said in made] == expected(batcher, made)
    with pytest.raises(ValueError, match="leaving"):
        batcher.submit(made[0][0])


def test_what_is_left_at_the_end_is_cancelled():
    batcher = batcher_of("decoder")
    made = requests_of(4, 5)
    batcher.submit_all([request for request, _ in made])
    batcher.close()
    batcher.run()
    assert [said["finish"] for _, said in made] == ["cancelled"] * 5


def test_a_failure_cancels_all_and_is_kept():
    batcher = batcher_of("decoder")
    made = requests_of(4, 2)
    batcher.params = {"nothing": 0}
    batcher.submit_all([request for request, _ in made])
    with pytest.raises(Exception):  # noqa: B017 - whatever it is
        batcher.run()
    assert batcher.failure is not None and [said["finish"] for _, said in made] == ["cancelled"] * 2


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_what_does_not_fit_is_refused_and_nothing_of_it_is_kept(batcher, data):
    prompt = data.draw(st.sampled_from([[], [3] * 21, [3] * 20, [5]]))
    limit = data.draw(st.sampled_from([0, -1, 13, 12]))
    good = Request([3], 1, Sampling(), lambda tokens, finish: None)
    if 0 < len(prompt) <= 20 and 0 < limit <= 12:
        return
    with pytest.raises(ValueError, match="expected 1 to"):
        batcher.submit_all([good, Request(prompt, limit, Sampling(), lambda tokens, finish: None)])
    assert batcher.waiting == 0
