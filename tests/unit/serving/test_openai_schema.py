"""Validation of request bodies: every error message can be sent as JSON in UTF-8."""

import dataclasses
import json

import pytest

from t5x_like.config import TokenizerConfig
from t5x_like.data.tokenizers.loading import load_tokenizer
from t5x_like.serving.openai_schema import BadRequest, Limits, parse

LIMITS = Limits(model="mine", vocab_size=320, max_prompt_length=40, max_new_tokens=24, draw_seed=lambda: 5)
TOKENIZER = load_tokenizer(TokenizerConfig(kind="bytes", num_sentinels=8), None)


def read(body):
    return parse(body, LIMITS, TOKENIZER.encode_marked)


def test_prompt_with_a_sentinel():
    assert read(b'{"prompt": "<extra_id_7>"}').prompts == ((TOKENIZER.sentinel_id(7),),)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "<extra_id_8>"}, "expected a sentinel below 8"),
        ({"prompt": f"<extra_id_{'9' * 5000}>"}, "a prompt of 5011 tokens"),
        ({"prompt": "a", "\ud800" * 5000: 5}, "not valid JSON .*surrogate"),
        ({"prompt": "a", "n": "\ud800"}, "not valid JSON"),
        ({"prompt": "a", "x" * 5000: 5}, "unknown field 'x{100}'"),
        ({"prompt": "a", "n": "b" * 5000}, "found 'b{100}', expected a whole number from 1 to 128"),
        ({"prompt": "a", "model": "gpt" * 5000}, "no model"),
        ({"prompt": "a", "top_k": 2**40}, "whole number"),
    ],
)
def test_error_message_can_be_sent(fields, message):
    with pytest.raises(BadRequest, match=message) as refused:
        read(json.dumps(fields).encode())
    assert len(json.dumps(refused.value.body(), ensure_ascii=False).encode()) < 2000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logprobs": 0, "repetition_penalty": 1.1}, "logprobs, repetition_penalty: this model fills masked positions"),
        ({"logprobs": 3}, "logprobs: this model fills masked positions in any order"),
        ({"suffix": "x" * 40}, "a prompt of 41 tokens"),
    ],
)
def test_what_a_model_that_fills_masked_positions_cannot_do_is_refused(fields, message):
    limits = dataclasses.replace(LIMITS, fills_gaps=True, unmasks=True)
    body = json.dumps({"prompt": "a", **fields}).encode()
    with pytest.raises(BadRequest, match=message):
        parse(body, limits, TOKENIZER.encode)


def test_a_suffix_is_read_by_a_model_that_fills_masked_positions_only():
    body = b'{"prompt": "a", "suffix": "bc"}'
    limits = dataclasses.replace(LIMITS, fills_gaps=True)
    assert parse(body, limits, TOKENIZER.encode).suffix == tuple(TOKENIZER.encode("bc"))
    with pytest.raises(BadRequest, match="suffix is not supported: leave it out"):
        read(body)
    assert read(b'{"prompt": "a", "suffix": ""}').suffix == ()
