"""Beam search against all sequences of a tiny vocabulary, and against itself in other batches."""

import numpy as np
import pytest
import test_decoding_generate as tiny

from t5x_like.decoding.beam import BeamSearch
from t5x_like.decoding.generate import beam_tokens
from t5x_like.decoding.scoring import score_tokens

EOS = 1
FEW = [EOS, 7, 21, 40]
"""With so few allowed tokens all sequences can be listed."""
PROMPTS = [[5, 9, 33, 7], [8], [60, 2, 12]]
ALLOWED = np.isin(np.arange(tiny.VOCABULARY), FEW)
LIMIT = 4


def penalized(search, log_p, length):
    base = (5 + length) / 6 if search.like == "t5x" else length
    return log_p / base**search.length_penalty


def listed(program, params, prompt, search, *, bidirectional=False):
    """All sequences that may come out, best first: (tokens without EOS, score)."""
    sequences = [[]]
    ended = [[EOS]]
    for _ in range(LIMIT - 1):
        sequences = [[*s, t] for s in sequences for t in FEW if t != EOS]
        ended += [[*s, EOS] for s in sequences]
    if search.like == "transformers":
        ended += [[*s, t] for s in sequences for t in FEW if t != EOS]
    scores = score_tokens(program, params, [(prompt, s) for s in ended], bidirectional=bidirectional)
    found = [(penalized(search, score.sum, len(s)), s) for s, score in zip(ended, scores, strict=True)]
    return [([t for t in s if t != EOS], score) for score, s in sorted(found, key=lambda pair: -pair[0])]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["encoder_decoder", "prefix_lm", "causal_lm"])
@pytest.mark.parametrize(
    "search",
    [
        BeamSearch(64, 0.6),
        BeamSearch(64, 2.0),
        BeamSearch(64, 0.0),
        BeamSearch(64, 1.0, "transformers", early_stopping="never"),
    ],
    ids=["t5x", "t5x long", "no penalty", "transformers"],
)
def test_with_enough_beams_the_search_is_exhaustive(layout, search):
    program, params = tiny.untrained(layout, "rope")
    bidirectional = layout == "prefix_lm"
    settings = dict(allowed_V=ALLOWED, max_new_tokens=LIMIT, bidirectional=bidirectional)
    for prompt, found in zip(PROMPTS, beam_tokens(program, params, PROMPTS, search=search, **settings), strict=True):
        expected = listed(program, params, prompt, search, bidirectional=bidirectional)[: search.size]
        assert len(found) == min(len(expected), search.size)
        np.testing.assert_allclose([h.score for h in found], [score for _, score in expected], rtol=1e-4, atol=1e-4)
        for hypothesis, (tokens, score) in zip(found, expected, strict=True):
            assert hypothesis.tokens == tokens or abs(hypothesis.score - score) < 1e-3
        assert found[0].tokens == expected[0][0]
