"""Retrieval by depth and length: where the statement is, what is counted, and contexts that a model cannot read."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.small_run import small_run
from hypothesis import given
from hypothesis import strategies as st

from t5x_like.config import CausalLM
from t5x_like.data.tokenizers.bytes import ByteTokenizer
from t5x_like.decoding.log_likelihood import score_tokens
from t5x_like.errors import DataError
from t5x_like.evaluation.console_tables import retrieval_table
from t5x_like.evaluation.retrieval import DEPTHS, retrieval_example, score_retrieval
from t5x_like.program import build_program
from t5x_like.utils.console import Console


@given(st.integers(200, 2000), st.sampled_from(DEPTHS), st.integers(0, 10**6))
def test_the_statement_is_at_its_depth(length: int, depth: float, number: int) -> None:
    example = retrieval_example(length, depth, number)
    *sentences, question = re.split(r"(?<=\.) ", example.context)
    name = re.fullmatch(r"The code of (\w+) is", question)
    assert name is not None and len(example.context) <= length
    # No sentence more would have fitted.
    assert len(example.context) > length - 45
    (place,) = (place for place, one in enumerate(sentences) if one.startswith(f"The code of {name[1]} is"))
    assert sentences[place] == f"The code of {name[1]} is{example.answers[0]}"
    assert place == round(depth * (len(sentences) - 1))
    # All candidates are in the context, each once.
    assert len(set(example.answers)) == 4
    assert all(example.context.count(answer) == 1 for answer in example.answers)
    assert example == retrieval_example(length, depth, number) != retrieval_example(length, depth, number + 1)


def loaded_model() -> Any:
    run = small_run(Path("unused"), "causal_lm", (CausalLM(),), lengths=(0, 240))
    program = build_program(run, jax.devices()[:1])
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(0.0, 0.3, leaf.shape).astype(np.float32), program.spec.params)
    return types.SimpleNamespace(
        path=Path("model"),
        kind="run",
        run=run,
        model=run.model,
        trained_on=run.data,
        tokenizer=ByteTokenizer(16),
        program=program,
        params=lambda step: (5, params),
    )


def test_an_answer_is_right_if_its_likelihood_is_the_highest(capsys: pytest.CaptureFixture[str]) -> None:
    loaded = loaded_model()
    found = score_retrieval(loaded, [180], num_examples=2)
    assert [(cell["length"], cell["depth"]) for cell in found["cells"]] == [(180, depth) for depth in DEPTHS]
    for cell in found["cells"]:
        right = 0
        for number in range(2):
            example = retrieval_example(180, cell["depth"], number)
            ids = loaded.tokenizer.encode(example.context)
            pairs = [(ids, loaded.tokenizer.encode(answer)) for answer in example.answers]
            sums = [score.sum for score in score_tokens(loaded.program, loaded.params(None)[1], pairs)]
            right += sums[0] > max(sums[1:])
        assert cell["accuracy"] == right / 2
    assert found["chance"] == 0.25 and found["scoring"] == "log_likelihood" and found["step"] == 5
    # The texts are the same for every model.
    assert found["digest"] == "ace5fc7ed48646fe"
    Console(width=200).print(retrieval_table(found))
    shown = " ".join(capsys.readouterr().out.split())
    assert "step 5: retrieval by log likelihood" in shown and "2 examples per cell, chance 25.0%" in shown
    for cell in found["cells"]:
        assert f"depth {cell['depth']:g}" in shown and f"{cell['accuracy']:.1%} [" in shown
    with pytest.raises(DataError, match=r"a context of \d+ characters with \d+ tokens, expected at most 234, which"):
        score_retrieval(loaded, [180, 600], num_examples=1)
