"""Scores of lm-eval's requests by models that predict masked tokens only, against a plain loop over masked rows."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.small_run import small_run

from t5x_like.config import CausalLM, MaskedDiffusion, MaskedLM, Objective
from t5x_like.config.objectives import Layout
from t5x_like.data.objectives.masked_diffusion import random_masks
from t5x_like.data.stream import rng
from t5x_like.data.tokenizers.bytes import ByteTokenizer
from t5x_like.errors import ConfigError
from t5x_like.evaluation.lm_requests import masked_request_format
from t5x_like.evaluation.masked_scores import _MASKS, ScoredText, default_scoring, require_scoring, score_texts
from t5x_like.program import build_program

TOKENIZER = ByteTokenizer(16)
MASK = TOKENIZER.vocabulary.mask_id
PAIRS = [("the cat", " sat"), ("", "ran"), ("red ", "x")]


def loaded_model(layout: Layout, *mixture: Objective) -> Any:
    run = small_run(Path("unused"), layout, mixture, lengths=(32, 0))
    program = build_program(run, jax.devices()[:1])
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(0.0, 0.3, leaf.shape).astype(np.float32), program.spec.params)
    return types.SimpleNamespace(
        path=Path("model"),
        kind="run",
        run=run,
        model=run.model,
        trained_on=run.data,
        tokenizer=TOKENIZER,
        program=program,
        values=params,
    )


def log_probability(loaded: Any, forward: Any, tokens: list[int], masked: list[int]) -> np.ndarray:
    """Return log p of the tokens at the masked positions given the others, by one pass over a row of 32."""
    seen = [MASK if position in masked else token for position, token in enumerate(tokens)]
    valid = np.arange(32) < len(seen)
    if loaded.model.decoder is None:
        features = {"encoder_input_tokens": seen}
    else:
        features = {"decoder_input_tokens": [0, *seen[:-1]]}
    row = {name: np.pad(values, (0, 32 - len(values)))[None].astype(np.int32) for name, values in features.items()}
    (name,) = row
    row[name.replace("input_tokens", "segment_ids")] = valid[None].astype(np.int32)
    if loaded.model.decoder is not None:
        row["decoder_causal_attention"] = valid[None].astype(np.int32)
    logits = np.asarray(forward(row), np.float64)[0, masked]
    return logits[np.arange(len(masked)), [tokens[position] for position in masked]] - np.log(np.exp(logits).sum(-1))


@pytest.mark.parametrize("layout", ["encoder", pytest.param("prefix_lm", marks=pytest.mark.slow)])
def test_scores_equal_a_plain_loop(layout: Layout) -> None:
    loaded = loaded_model(layout, MaskedDiffusion())
    forward = jax.jit(lambda batch: loaded.program.model(loaded.values)(batch))
    requests = [masked_request_format(loaded).pair(*pair) for pair in PAIRS]
    texts = [ScoredText([*inputs, *targets], len(inputs), len(targets)) for inputs, targets in requests]
    pseudo = score_texts(loaded.program, loaded.values, texts, MASK, "pseudo_likelihood")
    bounds = score_texts(loaded.program, loaded.values, texts, MASK, "diffusion_bound")
    for text, found, bound in zip(texts, pseudo, bounds, strict=True):
        positions = list(range(text.start, text.start + text.length))
        tokens = list(text.tokens)
        each = [log_probability(loaded, forward, tokens, [position])[0] for position in positions]
        assert found.sum == pytest.approx(sum(each), rel=1e-4)
        expected = 0.0
        for part in range(8):
            count = int((part + 0.5) / 8 * text.length) + 1
            key = rng.fold_in(rng.fold_in(_MASKS, text.length), np.array([part]))
            chosen = random_masks(key, np.array([count]), text.length)[0]
            masked = [position for position, is_masked in zip(positions, chosen, strict=True) if is_masked]
            expected += log_probability(loaded, forward, tokens, masked).sum() * text.length / count / 8
        assert bound.sum == pytest.approx(expected, rel=1e-4)


def test_every_token_of_a_long_text_is_scored_once() -> None:
    loaded = loaded_model("encoder", MaskedDiffusion())
    # A context that is too long loses its beginning, and the continuation stays whole.
    inputs, targets = masked_request_format(loaded).pair("a context that is longer than a row ", "of 32")
    assert TOKENIZER.decode(targets) == " of 32" and len(inputs) + len(targets) == 32
    text = "a text that is longer than three rows of the model, " * 2
    windows = masked_request_format(loaded).rolling(text)
    assert [token for _, targets in windows for token in targets] == list(TOKENIZER.encode(text))
    assert all(len(given) + len(scored) <= 32 for given, scored in windows)


def test_the_score_is_that_of_the_training() -> None:
    assert default_scoring(loaded_model("encoder", MaskedDiffusion())) == "diffusion_bound"
    masked_lm = loaded_model("encoder", MaskedLM())
    assert default_scoring(masked_lm) == "pseudo_likelihood"
    causal = loaded_model("causal_lm", CausalLM())
    assert default_scoring(causal) == "log_likelihood"
    for loaded, scoring in ((masked_lm, "log_likelihood"), (causal, "diffusion_bound")):
        with pytest.raises(ConfigError, match=f"--scoring: found {scoring} with an? (en|de)coder"):
            require_scoring(loaded, scoring, "--scoring")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="scoring: found 'bound', expected one of log_likelihood, pseudo_likelihood"):
        require_scoring(masked_lm, "bound", "scoring")  # type: ignore[arg-type]
