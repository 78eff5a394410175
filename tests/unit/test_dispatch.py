"""A value that a dispatch does not know is an error: it never takes the branch of another value."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import pytest
from helpers.config_examples import example
from helpers.data_examples import data_config
from helpers.reversed_span import ReversedSpan, ReversedSpanDenoiser

import t5x_like
from t5x_like.config import CausalLM, LabeledExamples, TaskHeadConfig, TokenizerConfig
from t5x_like.config.batch_spec import RowShape, sub_batch_spec
from t5x_like.config.dataclass import config_dataclass
from t5x_like.config.layouts import architecture_of, has_bidirectional_prefix, row_positions
from t5x_like.config.objectives import register_objective
from t5x_like.config.validation import required_vocabulary
from t5x_like.data.objectives.base import ObjectiveImplementation
from t5x_like.data.tokenizers.loading import tokenizer_from_model
from t5x_like.decoding.beam_search import BeamSearch
from t5x_like.errors import ConfigError
from t5x_like.models.layers import Norm

ROOT = Path(t5x_like.__file__).parent
UNKNOWN: Any = "unknown"


def test_every_match_on_a_name_or_an_attribute_has_a_case_for_all_other_values() -> None:
    """Values from outside, such as the error types of a library, are subscripts or calls, and may be left unhandled."""
    open_matches = []
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Match) and isinstance(node.subject, ast.Name | ast.Attribute):
                last = node.cases[-1]
                takes_all = isinstance(last.pattern, ast.MatchAs) and last.pattern.pattern is None and not last.guard
                if not takes_all:
                    open_matches.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not open_matches


@pytest.mark.parametrize(
    "dispatch",
    [
        lambda: architecture_of(UNKNOWN),
        lambda: has_bidirectional_prefix(UNKNOWN),
        lambda: row_positions(UNKNOWN, 8, 8),
        lambda: CausalLM().raw_window_length(UNKNOWN, 8, 8),
        lambda: sub_batch_spec(data_config(UNKNOWN, (CausalLM(),)), RowShape(8, 8, packed=False), 2),
        lambda: TaskHeadConfig(kind=UNKNOWN).outputs,
        lambda: TaskHeadConfig(kind=UNKNOWN).pools,
        lambda: LabeledExamples(kind=UNKNOWN).expected_loss_tokens(4),
        lambda: required_vocabulary(TokenizerConfig(kind=UNKNOWN)),
        lambda: BeamSearch(variant=UNKNOWN).normalize_score(jnp.zeros(1), jnp.ones(1)),
        lambda: Norm(dataclasses.replace(example("causal_lm").model.decoder, norm=UNKNOWN)),
        lambda: tokenizer_from_model(TokenizerConfig(kind=UNKNOWN), b"", "file"),
    ],
)
def test_unknown_layouts_heads_and_tokenizers_are_errors(dispatch: Callable[[], Any]) -> None:
    with pytest.raises(AssertionError, match="'unknown'"):
        dispatch()


@config_dataclass
class UnknownSource(ReversedSpan):
    example_source: ClassVar[Any] = "images"
    kind: Literal["unknown_source"] = "unknown_source"


@config_dataclass
class LabelledSpan(ReversedSpan):
    example_source: ClassVar[Any] = "labelled"
    kind: Literal["labelled_span"] = "labelled_span"


@pytest.mark.parametrize(
    ("config_class", "missing"),
    [(UnknownSource, "a known example_source"), (LabelledSpan, "the base class LabeledExamples")],
)
def test_objectives_with_a_source_that_no_reader_has_are_refused(config_class: type[Any], missing: str) -> None:
    with pytest.raises(ConfigError, match=missing):
        register_objective(config_class, ReversedSpanDenoiser)


def test_an_objective_that_continues_text_without_saying_how_is_an_error() -> None:
    class Silent(ReversedSpanDenoiser):
        continues_text = True

    assert not ObjectiveImplementation.continues_text
    with pytest.raises(NotImplementedError, match="Silent sets continues_text"):
        Silent(ReversedSpan()).continuation(None, None)  # type: ignore[arg-type]
