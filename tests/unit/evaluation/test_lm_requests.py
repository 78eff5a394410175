"""Layout of lm-eval requests: each token is scored once, and contexts are truncated on the left."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.data.objectives.prompts import PromptFormat
from t5x_like.data.tokenizers.bytes import ByteTokenizer
from t5x_like.decoding.log_likelihood import Score
from t5x_like.errors import ConfigError
from t5x_like.evaluation.lm_requests import RequestFormat

TOKENIZER = ByteTokenizer(8)
STREAM = PromptFormat(mode=None, ends_in_eos=False, bidirectional=False, sentinels=False)
CLOSED = PromptFormat(mode="S", ends_in_eos=True, bidirectional=True, sentinels=False)
SPANS = PromptFormat(mode="R", ends_in_eos=True, bidirectional=False, sentinels=True)
TEXT = st.text("ab c", max_size=60)


def model(form: PromptFormat, inputs: int = 12, targets: int = 7) -> RequestFormat:
    return RequestFormat(TOKENIZER, form, inputs, targets)


def words(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens)


def test_pair_in_each_format():
    inputs, targets = model(STREAM).pair("ab ", "c")
    assert (words(inputs), words(targets)) == ("ab", " c"), "the space belongs to the continuation"
    inputs, targets = model(CLOSED).pair("ab", " c")
    assert (words(inputs), words(targets)) == ("[S]ab", " c") and inputs[-1] == 1
    inputs, targets = model(SPANS).pair("ab", " c")
    assert (words(inputs), words(targets)) == ("[R]ab<extra_id_0>", "<extra_id_0> c")
    assert model(SPANS).log_likelihood(Score(-7.0, (-4.0, -1.0, -2.0), True)) == (-3.0, True)
    assert model(CLOSED).log_likelihood(Score(-7.0, (-4.0, -3.0), False)) == (-7.0, False)
    assert model(SPANS).text(TOKENIZER.encode_marked("<extra_id_0> c d<extra_id_1>x")) == " c d"
    assert model(SPANS).text(TOKENIZER.encode_marked("none")) == "none"


def test_lengths_without_positions_for_text_are_refused():
    for form, least in ((STREAM, 2), (CLOSED, 4), (SPANS, 5)):
        model(form, least)
        with pytest.raises(ConfigError, match=f"found {least - 1}, expected at least {least}"):
            model(form, least - 1)


@pytest.mark.parametrize("form", [STREAM, CLOSED, SPANS])
@settings(max_examples=40, deadline=None)
@given(text=TEXT, inputs=st.integers(6, 20), targets=st.integers(1, 9))
def test_each_token_is_scored_once_after_its_context(form, text, inputs, targets):
    whole = model(form, inputs, targets)
    windows = whole.rolling(text)
    scored = [token for _, wanted in windows for token in wanted if token < TOKENIZER.vocabulary.base_size]
    assert words(scored) == text
    done = 0
    for given_ids, wanted in windows:
        context = words([token for token in given_ids if 2 < token < TOKENIZER.vocabulary.base_size])
        assert text[:done].endswith(context), "the context must be the preceding text"
        if form is STREAM:
            assert len(given_ids) + len(wanted) <= inputs
            assert done == 0 or len(context) >= 1
            assert done == 0 or len(given_ids) + len(wanted) == inputs, (
                "the context must have the largest length that fits"
            )
        else:
            assert len(given_ids) <= inputs and len(wanted) <= targets + form.sentinels
            assert len(context) == min(done, inputs - len(given_ids) + len(context))
        done += len([token for token in wanted if token < TOKENIZER.vocabulary.base_size])


@settings(max_examples=40, deadline=None)
@given(context=TEXT, continuation=TEXT)
def test_long_context_is_truncated_on_the_left(context, continuation):
    given_ids, wanted = model(STREAM).pair(context, continuation)
    assert (context + continuation).endswith(words(given_ids) + words(wanted))
    assert len(given_ids) <= max(12 - len(wanted), 0)
    given_ids, wanted = model(CLOSED).pair(context, continuation)
    assert len(given_ids) <= 12 and given_ids[-1] == 1
    prompt = model(STREAM).prompt(context, new_tokens=5)
    assert len(prompt) <= 7 and context.rstrip(" ").endswith(words(prompt))
