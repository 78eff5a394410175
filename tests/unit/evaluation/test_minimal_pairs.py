"""Minimal pairs: the score of a text against the model's own logits in four architectures, and malformed files."""

from __future__ import annotations

import json
import math
import types
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest
from helpers.small_run import small_run

from t5x_like.config import CausalLM, MaskedDiffusion, Objective, PrefixLM
from t5x_like.config.objectives import Layout
from t5x_like.data.tokenizers.bytes import ByteTokenizer
from t5x_like.errors import EXIT_USAGE, ConfigError, DataError
from t5x_like.evaluation import masked_scores
from t5x_like.evaluation.masked_scores import Scoring
from t5x_like.evaluation.minimal_pairs import read_pairs, score_pairs
from t5x_like.program import build_program

TOKENIZER = ByteTokenizer(16)
MIXTURES: dict[str, tuple[Objective, ...]] = {
    "encoder": (MaskedDiffusion(),),
    "prefix_lm in place": (MaskedDiffusion(),),
    "causal_lm": (CausalLM(),),
    "prefix_lm": (PrefixLM(name="S", mode="S"),),
    "encoder_decoder": (PrefixLM(name="S", mode="S"),),
}
PAIRS = [("the cats sleep", "the cats sleeps"), ("a dog ran", "a dog run")]


def loaded_model(kind: str, scale: float) -> Any:
    """Return what `score_pairs` reads of a model, with random parameters whose logits are multiplied by `scale`."""
    lengths = (32, 0) if kind == "encoder" else (32, 32)
    layout = cast(Layout, kind.removesuffix(" in place"))
    run = small_run(Path("unused"), layout, MIXTURES[kind], lengths=lengths)
    program = build_program(run, jax.devices()[:1])
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(0.0, 0.3, leaf.shape).astype(np.float32), program.spec.params)
    params["head"]["kernel"] *= scale
    return types.SimpleNamespace(
        path=Path("model"),
        kind="run",
        run=run,
        model=run.model,
        trained_on=run.data,
        tokenizer=TOKENIZER,
        program=program,
        params=lambda step: (5, params),
    )


def write_pairs(folder: Path, pairs: list[tuple[str, str]]) -> Path:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps({"good": good, "bad": bad}) + "\n" for good, bad in pairs))
    return file


def features_of(kind: str, text: str) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Return rows that score a text, the position of each of its tokens' predictions as (row, column), and the ids."""
    ids, eos = TOKENIZER.encode(text), TOKENIZER.eos_id
    mode = TOKENIZER.vocabulary.mode_id("S")
    each = np.arange(len(ids))
    rows = np.tile([*ids, eos], (len(ids), 1))
    rows[each, each] = TOKENIZER.vocabulary.mask_id
    if kind == "encoder":
        return {"encoder_input_tokens": rows}, np.stack([each, each]), np.array(ids)
    if kind == "prefix_lm in place":
        shifted = np.concatenate([np.zeros_like(rows[:, :1]), rows[:, :-1]], axis=1)
        features = {"decoder_input_tokens": shifted, "decoder_causal_attention": np.ones_like(rows)}
        return features, np.stack([each, each]), np.array(ids)
    if kind == "encoder_decoder":
        rows = {"encoder_input_tokens": np.array([[mode, eos]]), "decoder_input_tokens": np.array([[0, *ids[:-1]]])}
        return rows, np.stack([0 * each, each]), np.array(ids)
    given = [mode, eos] if kind == "prefix_lm" else []
    stream = np.array([[0, *given, *ids[:-1]]])
    rows = {"decoder_input_tokens": stream}
    if given:
        rows["decoder_causal_attention"] = (np.arange(stream.shape[1]) <= 2).astype(np.int32)[None]
    return rows, np.stack([0 * each, each + len(given)]), np.array(ids)


@pytest.mark.parametrize("kind", MIXTURES)
def test_scores_are_the_log_probabilities_of_the_model(kind: str, tmp_path: Path) -> None:
    loaded = loaded_model(kind, scale=1.0)
    is_masked = any(objective.predicts_in_place for objective in MIXTURES[kind])
    scoring: Scoring = "pseudo_likelihood" if is_masked else "log_likelihood"
    found = score_pairs(loaded, write_pairs(tmp_path, PAIRS), scoring=scoring)
    logits_of = jax.jit(lambda batch: loaded.program.model(loaded.params(None)[1])(batch))
    for pair, scores in zip(PAIRS, found["scores"], strict=True):
        for text, score in zip(pair, scores, strict=True):
            rows, (row, column), ids = features_of(kind, text)
            logits = np.asarray(logits_of(rows), np.float64)[row, column]
            expected = logits[np.arange(len(ids)), ids] - np.log(np.exp(logits).sum(axis=-1))
            assert score == pytest.approx(expected.sum(), rel=1e-4, abs=1e-3)
    assert found["num_pairs"] == 2 and found["step"] == 5
    assert found["scoring"] == scoring
    assert found["accuracy"] == np.mean([good > bad for good, bad in found["scores"]])
    swapped = score_pairs(loaded, write_pairs(tmp_path, [(bad, good) for good, bad in PAIRS]), scoring=scoring)
    assert swapped["accuracy"] == 1 - found["accuracy"]
    assert swapped["mean_difference"] == pytest.approx(-found["mean_difference"], rel=1e-4, abs=1e-3)


def test_the_bound_of_a_uniform_encoder_is_that_of_its_tokens(tmp_path: Path) -> None:
    """Each token costs ln V under any mask, so that the weights of all masked tokens must sum to the length."""
    loaded = loaded_model("encoder", scale=0.0)
    file = write_pairs(tmp_path, [("the cats sleep", "the cats sleeps"), ("ab", "a"), ("same", "size")])
    found = score_pairs(loaded, file, scoring="diffusion_bound")
    size = loaded.model.vocab_size
    lengths = [[14, 15], [2, 1], [4, 4]]
    for scores, expected in zip(found["scores"], lengths, strict=True):
        assert scores == pytest.approx([-count * math.log(size) for count in expected], rel=1e-5)
    # The shorter text is more likely. Equal scores are no success.
    assert found["accuracy"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"good": "a", "bad": "b"}\n{"good": "a"}\n', "pairs.jsonl:2: found no field 'bad' among good"),
        ('{"good": "a", "bad": 3}\n', "pairs.jsonl:1: found 3, expected a text"),
        ('{"good": "a", "bad": " "}\n', "pairs.jsonl:1: found ' ', expected a text"),
        ('{"good": "a", "bad": "a"}\n', "the same text in 'good' and 'bad'"),
        ('["a", "b"]\n', "pairs.jsonl:1: found a JSON list, expected an object"),
        ("{good\n", "pairs.jsonl:1: found invalid JSON"),
        ("\n", "found no rows, expected JSON lines with 'good' and 'bad'"),
    ],
)
def test_malformed_files_are_refused_with_the_line(content: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(content)
    with pytest.raises(DataError) as caught:
        read_pairs(file)
    assert expected in str(caught.value) and caught.value.exit_code == EXIT_USAGE


def test_texts_and_scores_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    encoder = loaded_model("encoder", scale=1.0)
    long = write_pairs(tmp_path, [("a", "b"), ("x" * 40, "y")])
    # With the EOS.
    with pytest.raises(DataError, match=r"pairs.jsonl:2: found a text of 41 tokens, expected at most 32"):
        score_pairs(encoder, long)
    with pytest.raises(DataError, match=r"pairs.jsonl:1: found a text of 70 tokens, expected at most 64"):
        score_pairs(loaded_model("causal_lm", scale=1.0), write_pairs(tmp_path, [("x" * 70, "y")]))
    file = write_pairs(tmp_path, PAIRS)
    with pytest.raises(ConfigError, match="log_likelihood with an encoder"):
        score_pairs(encoder, file, scoring="log_likelihood")
    with pytest.raises(ConfigError, match="pseudo_likelihood with a decoder"):
        score_pairs(loaded_model("causal_lm", scale=1.0), file, scoring="pseudo_likelihood")


class WithoutSpaces(ByteTokenizer):
    """Tokenizer that removes zero-width spaces, as the normalizations of published ones do."""

    def encode(self, text: str) -> Any:
        return super().encode(text.replace("\N{ZERO WIDTH SPACE}", ""))


def test_a_text_without_tokens_is_refused(tmp_path: Path) -> None:
    """It would have the score 0, the highest of all."""
    loaded = loaded_model("causal_lm", scale=1.0)
    loaded.tokenizer = WithoutSpaces(16)
    with pytest.raises(DataError, match=r"pairs.jsonl:1: found .*, which has no tokens"):
        score_pairs(loaded, write_pairs(tmp_path, [("a", "\N{ZERO WIDTH SPACE}")]))


def test_scores_do_not_depend_on_the_number_of_rows_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, file = loaded_model("encoder", scale=1.0), write_pairs(tmp_path, PAIRS)
    expected = score_pairs(loaded, file)["scores"]
    monkeypatch.setattr(masked_scores, "_ROWS_AT_ONCE", 8)
    assert np.array(score_pairs(loaded, file)["scores"]) == pytest.approx(np.array(expected), rel=1e-4)
