"""Batched generation against recomputation without a cache."""

import copy
import functools

import numpy as np
import pytest
from helpers.decoding_examples import ALLOWED, EOS, PROMPTS, VOCABULARY, recompute, untrained

from t5x_like.decoding import engine
from t5x_like.decoding.continuous_batching import Batcher, BatcherConfig
from t5x_like.decoding.engine import generate_tokens
from t5x_like.decoding.sampling import Sampling
from t5x_like.errors import ConfigError


@pytest.mark.parametrize(
    ("layout", "positions"),
    [
        pytest.param("encoder_decoder", "learned", marks=pytest.mark.slow),
        ("prefix_lm", "rope"),
        ("causal_lm", "relative_bias"),
    ],
)
def test_greedy_decoding_equals_recomputation(layout, positions):
    program, params = untrained(layout, positions)
    bidirectional = layout == "prefix_lm"
    settings = dict(allowed_V=ALLOWED, max_new_tokens=20, bidirectional=bidirectional)
    result = generate_tokens(program, params, PROMPTS, batch_size=3, **settings)
    assert result == recompute(program, params, PROMPTS, 20)
    assert len({token for tokens in result for token in tokens}) > 10, "the tokens must vary"


def test_prefix_attention_is_bidirectional():
    program, params = untrained("prefix_lm")
    settings = dict(allowed_V=ALLOWED, max_new_tokens=20)
    both = generate_tokens(program, params, PROMPTS, bidirectional=True, **settings)
    assert both != generate_tokens(program, params, PROMPTS, **settings)


def test_row_ends_at_eos_and_at_its_limit():
    program, params = untrained("causal_lm")
    free = generate_tokens(program, params, PROMPTS, allowed_V=ALLOWED, max_new_tokens=24)
    assert [len(tokens) for tokens in free] == [24] * 4
    assert generate_tokens(program, params, PROMPTS, allowed_V=ALLOWED, max_new_tokens=17) == [t[:17] for t in free]
    assert generate_tokens(program, params, [], allowed_V=ALLOWED, max_new_tokens=24) == []

    # A model with the logits of EOS and another token swapped: each row ends at that token, and the others continue.
    token = free[0][11]
    swap = np.arange(VOCABULARY)
    swap[[EOS, token]] = token, EOS
    swapped = copy.copy(params)
    swapped["head"] = {"kernel": params["head"]["kernel"][:, swap]}
    cut = generate_tokens(program, swapped, PROMPTS, allowed_V=ALLOWED[swap], max_new_tokens=24)
    assert cut == [tokens[: tokens.index(token)] if token in tokens else tokens for tokens in free]
    assert len(set(map(len, cut))) > 1


@pytest.mark.parametrize("layout", ["encoder_decoder", "prefix_lm"])
def test_sampled_row_is_independent_of_the_batch(layout):
    program, params = untrained(layout)
    sample = functools.partial(
        generate_tokens,
        program,
        params,
        allowed_V=ALLOWED,
        max_new_tokens=12,
        bidirectional=layout == "prefix_lm",
        sampling=Sampling(temperature=1.5, top_k=20, top_p=0.95),
    )
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[3]]
    together = sample(prompts, seed=7)
    assert together == [sample([prompt], seed=7, rows=[row])[0] for row, prompt in enumerate(prompts)]
    assert sample([[9] * 4, *prompts[::-1]], seed=7, rows=[3, 2, 1, 0])[1:] == together[::-1]
    # The same prompt with another row number or another seed is another draw.
    same = sample([PROMPTS[0]] * 3, seed=7)
    assert len(set(map(tuple, same))) == 3
    assert sample(prompts, seed=8) != together


def test_calls_with_many_lengths_compile_one_program():
    program, params = untrained("causal_lm")
    before = engine._decode_batch._cache_size()
    for length in range(1, 15):
        prompts = [[5] * length, [6], [7] * (length // 2)]
        generate_tokens(program, params, prompts, allowed_V=ALLOWED, max_new_tokens=1 + length)
    assert engine._decode_batch._cache_size() - before <= 1


def test_learned_positions_limit_prompt_and_new_tokens():
    program, params = untrained("causal_lm", "learned", max_positions=24)
    assert len(generate_tokens(program, params, [[5] * 17], allowed_V=ALLOWED, max_new_tokens=6)[0]) == 6
    with pytest.raises(ConfigError, match="26 positions, expected at most 24"):
        Batcher(program, params, allowed_V=ALLOWED, config=BatcherConfig(max_prompt_length=16, max_new_tokens=9))
    with pytest.raises(ConfigError, match="25 positions, expected at most 24"):
        generate_tokens(program, params, [[5] * 17], allowed_V=ALLOWED, max_new_tokens=7)
