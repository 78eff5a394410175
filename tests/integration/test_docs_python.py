"""Every code block of docs/python.md is executed, in the order of the page, on one small model."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t5x_like.cli.main import main
from t5x_like.errors import EXIT_USAGE, ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)
WORDS = "one two three four five six seven eight".split()


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the names that are defined when the whole page has been executed."""
    root = tmp_path_factory.mktemp("docs_python")
    (root / "texts").mkdir()
    rng = random.Random(0)
    for number in range(12):
        (root / "texts" / f"{number}.txt").write_text(" ".join(rng.choices(WORDS, k=200)))
    namespace: dict[str, Any] = {"root": root}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for number, block in enumerate(BLOCKS):
            exec(compile(block, f"{PAGE.name}, block {number}", "exec"), namespace)
    return namespace


def test_page_has_the_announced_examples() -> None:
    assert len(BLOCKS) == 5
    by_hand = BLOCKS[-1].strip().splitlines()
    assert "train_step" in BLOCKS[-1] and len(by_hand) < 30


def test_trained_run_is_finished_and_loaded(names: dict[str, Any]) -> None:
    assert names["finished"] is True
    assert (names["model"].step, names["model"].config) == (2, names["run"].model)
    assert names["ids"] == [ord(character) + 3 for character in "one two"]


def test_generation_returns_one_answer_per_prompt_and_sample(names: dict[str, Any]) -> None:
    assert [len(names[name]) for name in ("answers", "samples", "filled")] == [2, 3, 1]
    assert all(isinstance(answer, str) for answer in names["answers"] + names["samples"])


def test_scores_losses_and_logits_agree(names: dict[str, Any]) -> None:
    model, scores = names["model"], names["scores"]
    assert len(scores[0].per_token) == len(" three")
    assert names["loss_of_target"] == pytest.approx(-scores[0].sum / len(" three"), rel=1e-5)
    assert 0 < names["loss_of_text"] < 20
    assert names["logits"].shape == (1, 4, 288)
    # `score` lays its inputs out as in training: with the mode token in front and EOS.
    vocabulary = model.tokenizer.vocabulary
    inputs = [vocabulary.mode_id("S"), *model.tokenizer.encode("one two"), 1]
    targets = model.tokenizer.encode(" three")
    logits = model.logits([inputs], [targets])[0]
    log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    found = log_p[np.arange(len(targets)), targets]
    np.testing.assert_allclose(found, scores[0].per_token, rtol=1e-4, atol=1e-4)


def test_embeddings_are_normalized(names: dict[str, Any]) -> None:
    assert names["vectors"].shape == (2, 32)
    np.testing.assert_allclose(np.linalg.norm(names["vectors"], axis=1), 1, rtol=1e-5)
    assert -1 <= names["similarity"] <= 1


def test_steps_by_hand_equal_those_of_the_run(names: dict[str, Any]) -> None:
    losses = names["losses"]
    assert len(losses) == 3 and losses[2] < losses[0]
    # The run logs the weighted mean of its two steps.
    lines = (names["root"] / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    logged = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    assert min(losses[:2]) - 1e-5 <= logged[-1] <= max(losses[:2]) + 1e-5


def test_an_unknown_setting_of_generate_is_refused_with_a_suggestion(names: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="max_new_token=.*perhaps max_new_tokens"):
        names["model"].generate(["one"], max_new_token=3)


def test_a_step_that_is_not_saved_is_refused_before_anything_is_evaluated(
    names: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(names["root"])
    before = sorted(names["root"].rglob("*"))
    assert main(["eval", "runs/tiny:2,7,9"]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "runs/tiny: found no checkpoint of step 7, expected one of the saved steps: 2" in error and "step 9" in error
    assert sorted(names["root"].rglob("*")) == before
    assert main(["generate", "runs/tiny:7", "--prompt", "one"]) == EXIT_USAGE
    assert "found no checkpoint of step 7" in capsys.readouterr().err
