"""What a request's body may hold: refusals are answers that JSON in UTF-8 can carry, whatever they are about."""

import json

import pytest

from t5x_like.config import TokenizerConfig
from t5x_like.data import tokenizers
from t5x_like.serving.protocol import BadRequest, parse

TOKENIZER = tokenizers.load(TokenizerConfig(kind="bytes", num_sentinels=8), None)


def read(body):
    return parse(
        body,
        model="mine",
        encode=TOKENIZER.encode_marked,
        vocab_size=320,
        longest_prompt=40,
        most_tokens=24,
        draw_seed=lambda: 5,
    )


def test_a_prompt_with_a_sentinel():
    assert read(b'{"prompt": "<extra_id_7>"}').prompts == ((TOKENIZER.sentinel_id(7),),)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "<extra_id_8>"}, "expected a sentinel below 8"),
        ({"prompt": f"<extra_id_{'9' * 5000}>"}, "a prompt of 5011 tokens"),
        ({"prompt": "a", "\ud800" * 5000: 5}, "unknown field"),
        ({"prompt": "a", "n": "\ud800"}, "whole number"),
        ({"prompt": "a", "model": "\ud800" * 5000}, "no model"),
        ({"prompt": "a", "top_k": 2**40}, "whole number"),
    ],
)
def test_a_refusal_can_be_sent(fields, message):
    with pytest.raises(BadRequest, match=message) as refused:
        read(json.dumps(fields).encode())
    assert len(json.dumps(refused.value.body(), ensure_ascii=False).encode()) < 2000
