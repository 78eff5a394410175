"""Objectives are open to other people's code: a complete one works everywhere, one that lacks a part is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
from helpers.config_examples import changed, example
from helpers.data_examples import data_config, numbered_store, raw_tokens
from helpers.reversed_span import ReversedSpan, ReversedSpanDenoiser

from t5x_like.config import SpanCorruption, batch_spec
from t5x_like.config.dataclass import config_dataclass
from t5x_like.config.objectives import (
    ExampleLengths,
    Layout,
    ObjectiveConfig,
    Supervised,
    parse_objective,
    register_objective,
    registered_kinds,
    registry,
)
from t5x_like.config.objectives.registry import IMPLEMENTATION_PARTS, implementation_class
from t5x_like.config.overrides import apply_overrides
from t5x_like.config.recipes import load_recipe
from t5x_like.config.serialization import from_json, to_dict, to_json
from t5x_like.config.validation import validate
from t5x_like.data.inspection.row_statistics import row_statistics
from t5x_like.data.objectives.base import ObjectiveImplementation
from t5x_like.data.objectives.registry import denoise, implementation
from t5x_like.data.stream import heldout
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.data.tokenizers.bytes import ByteTokenizer
from t5x_like.data.tokenizers.vocabulary import Vocabulary
from t5x_like.decoding import infill_prompts
from t5x_like.decoding.prompt_format import infill_format, prompt_format
from t5x_like.errors import ConfigError
from t5x_like.planning.estimate.tokens import denoiser_tokens

MINE = ReversedSpan(mode="X", rate=2.0)
MIXTURE = (MINE, SpanCorruption(name="R", mode="R"))


@pytest.mark.parametrize("kind", registered_kinds())
def test_every_registered_kind_has_a_complete_implementation(kind: str) -> None:
    assert issubclass(implementation_class(kind), ObjectiveImplementation)


def test_the_required_parts_are_the_abstract_methods() -> None:
    assert set(IMPLEMENTATION_PARTS) == ObjectiveImplementation.__abstractmethods__


# A complete objective of another file.


def test_its_configuration_is_validated() -> None:
    run = changed(example(), "data.mixture", MIXTURE)
    assert validate(run) == []
    (problem,) = validate(changed(run, "data.mixture.0.span_fraction", 1.5))
    assert str(problem) == "data.mixture.0.span_fraction: found 1.5, expected a number in (0, 1)"
    (problem,) = validate(changed(changed(run, "data.inputs_length", 4), "data.targets_length", 2))[:1]
    assert problem.where == "data.mixture.0" and "'reversed_span'" in problem.found


def test_its_configuration_survives_json(tmp_path: Path) -> None:
    run = changed(example(), "data.mixture", MIXTURE)
    path = tmp_path / "config.json"
    path.write_text(to_json(run))
    assert load_recipe(str(path)) == run
    document = to_dict(run)
    document["data"]["mixture"][0]["span_fractoin"] = 0.5
    with pytest.raises(ConfigError, match=r"data\.mixture\.0\.span_fractoin: found an unknown field"):
        from_json(json.dumps(document), source="config.json")


def test_a_recipe_and_the_command_line_can_set_its_fields(tmp_path: Path) -> None:
    (tmp_path / "recipe.py").write_text(
        "from helpers.config_examples import changed, example\n"
        "from helpers.reversed_span import ReversedSpan\n"
        "def recipe():\n"
        "    return changed(example(), 'data.mixture', (ReversedSpan(mode='X'),))\n"
    )
    run = apply_overrides(
        load_recipe(str(tmp_path / "recipe.py")), ["--data.mixture.0.span-fraction", "0.5", "--data.mixture.0.rate=3"]
    )
    assert run.data.mixture == (ReversedSpan(mode="X", span_fraction=0.5, rate=3.0),)


def test_unknown_kinds_are_refused_with_the_registered_ones() -> None:
    document = to_dict(changed(example(), "data.mixture", MIXTURE))
    document["data"]["mixture"][0]["kind"] = "reversed_spam"
    with pytest.raises(ConfigError) as caught:
        from_json(json.dumps(document), source="config.json")
    message = str(caught.value)
    assert "data.mixture.0.kind: found 'reversed_spam', expected one of 'span_corruption', " in message
    assert "'reversed_span'" in message


@pytest.mark.parametrize("layout", ["encoder_decoder", "prefix_lm"])
@pytest.mark.parametrize("example_mode", ["windows", "documents"])
def test_it_makes_training_rows_that_restore(
    tmp_path: Path, layout: Layout, example_mode: Literal["windows", "documents"]
) -> None:
    data = dataclasses.replace(data_config(layout, MIXTURE), example_mode=example_mode)
    lengths = [37] * 100 if example_mode == "documents" else []
    stream = TrainingStream([numbered_store(tmp_path / "store", 3700, 370, lengths=lengths)], data, 8)
    (features,) = stream.batch(0).values()
    if example_mode == "windows":
        kinds = set()
        for row in range(8):
            single = {name: values[row : row + 1] for name, values in features.items()}
            restored = raw_tokens(single, data, stream.vocabulary)
            assert np.array_equal(restored, restored[0] + np.arange(len(restored)))
            kinds.add(int(features["denoiser_ids"][row]))
        assert kinds == {0, 1}
    counted = row_statistics(stream, 64)
    mine, _ = counted.objectives
    assert mine.examples and not mine.broken
    assert [fit.subject for fit in mine.fits] == ["start of the span"]
    (batch,) = heldout.objective_batches(stream.store, data, data.sources[0], 4, MINE, 1)
    assert set(batch["main"]) <= set(features) | {"denoiser_ids"}
    assert (batch["main"]["denoiser_ids"] == 0).all()


def test_planning_counts_its_tokens() -> None:
    run = changed(example(), "data.mixture", MIXTURE)
    mine, _ = denoiser_tokens(run)
    window = MINE.raw_window_length("encoder_decoder", 64, 64)
    assert mine.rows == pytest.approx(8 * 2 / 3) and mine.raw_tokens == pytest.approx(mine.rows * window)
    assert mine.loss_tokens == pytest.approx(mine.rows * (MINE.span_length(window) + 2))
    assert batch_spec(run)["main"]["encoder_input_tokens"].shape == (8, 64)


def test_prompts_have_its_form_and_answers_are_reversed() -> None:
    data, tokenizer = data_config("encoder_decoder", (MINE,)), ByteTokenizer(16)
    vocabulary = tokenizer.vocabulary
    assert prompt_format(data, None).ids([10, 11], vocabulary) == [vocabulary.mode_id("X"), 10, 11, 1]
    form = infill_format(data, "X")
    text = infill_prompts.split_at_gaps("a<mask>d")
    assert form is not None and text is not None
    (query,) = infill_prompts.queries(text, form, tokenizer)
    sentinel = vocabulary.sentinel_id(0)
    assert query.ids == (vocabulary.mode_id("X"), ord("a") + 3, sentinel, ord("d") + 3, 1)
    answer = [sentinel, ord("c") + 3, ord("b") + 3]
    texts = infill_prompts.span_texts(infill_prompts.spans([answer], text, form, tokenizer), tokenizer)
    assert infill_prompts.filled(text, texts, tokenizer) == "abcd"


def test_reports_describe_it() -> None:
    assert parse_objective(dataclasses.asdict(MINE)).description == "reversed span, 25 %"


# Objectives that are refused.


@config_dataclass
class Incomplete(ObjectiveConfig):
    kind: Literal["incomplete"] = "incomplete"
    name: str = "incomplete"

    @property
    def description(self) -> str:
        return ""

    def longest_example(self, raw_length: int) -> ExampleLengths:
        return ExampleLengths(0, raw_length, raw_length)


class WithoutRestore(ObjectiveImplementation[Incomplete]):
    denoise = ReversedSpanDenoiser.denoise
    prompt_format = ReversedSpanDenoiser.prompt_format


def test_an_objective_that_lacks_parts_is_refused_by_name_with_all_of_them() -> None:
    with pytest.raises(ConfigError) as caught:
        register_objective(Incomplete, WithoutRestore)
    message = str(caught.value)
    assert message.count("registration of the objective tests.unit.data.test_registered_objectives.Incomplete: ") == 2
    assert "without expected_loss_tokens, min_raw_length, sentinels_needed, has_inputs" in message
    assert "an implementation WithoutRestore without restore, noise_fits" in message
    assert "incomplete" not in registered_kinds()


def test_a_class_without_the_decorator_is_refused() -> None:
    class Plain(ReversedSpan):
        kind: Literal["plain"] = "plain"  # type: ignore[assignment]

    with pytest.raises(ConfigError, match="Plain.*without config_dataclass"):
        register_objective(Plain, ReversedSpanDenoiser)


def test_a_kind_is_registered_by_one_class() -> None:
    @config_dataclass
    class Mine(ReversedSpan):
        kind: Literal["span_corruption"] = "span_corruption"  # type: ignore[assignment]

    with pytest.raises(
        ConfigError,
        match="'span_corruption', already registered by t5x_like",
    ):
        register_objective(Mine, ReversedSpanDenoiser)
    # The same class can be registered again, as when its file is loaded twice.
    register_objective(ReversedSpan, ReversedSpanDenoiser)
    assert type(implementation(MINE)) is ReversedSpanDenoiser


def test_an_unregistered_subclass_is_not_written_as_its_base_class() -> None:
    @config_dataclass
    class Longer(SpanCorruption):
        def max_spans(self, raw_length: int) -> int:
            return super().max_spans(raw_length) + 1

    run = changed(example(), "data.mixture", (Longer(name="longer"),))
    with pytest.raises(ConfigError, match=r"data\.mixture\.0: found the class .*Longer of kind 'span_corruption'"):
        to_json(run)


def test_an_incomplete_reference_is_refused_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.OBJECTIVES, "_entries", dict(registry.OBJECTIVES))
    monkeypatch.setattr(registry, "_IMPLEMENTATIONS", dict(registry._IMPLEMENTATIONS))

    @config_dataclass
    class Referenced(ReversedSpan):
        has_inputs: ClassVar[bool] = True
        kind: Literal["referenced"] = "referenced"  # type: ignore[assignment]

    with pytest.raises(ConfigError, match="found the implementation 'nowhere', expected \"module:class\""):
        register_objective(Referenced, "nowhere")
    register_objective(Referenced, f"{__name__}:WithoutRestore")
    with pytest.raises(ConfigError, match="objective 'referenced'.*without restore, noise_fits"):
        implementation(Referenced())


def test_pairs_are_not_made_from_windows() -> None:
    vocabulary = Vocabulary(base_size=20, num_sentinels=2)
    with pytest.raises(ValueError, match="supervised: found windows of text, expected a corpus of supervised pairs"):
        denoise(np.full((1, 4), 5), np.zeros(1, np.uint64), Supervised(), vocabulary)
