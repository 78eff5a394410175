"""Every problem of a configuration is found, at its place, with its numbers, together with all the others."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from config_examples import STACK, changed, example
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.config import (
    AdamW,
    Bart,
    BlankInfilling,
    CausalLM,
    CausalMasking,
    ConfigError,
    CorpusConfig,
    FillInTheMiddle,
    MaskedLM,
    PartitioningConfig,
    PrefixLM,
    Problem,
    RunConfig,
    Schedule,
    SpanCorruption,
    TokenizerConfig,
)
from t5x_like.config.lengths import raw_window_length, sentinels_needed
from t5x_like.config.objectives import Layout
from t5x_like.config.sections import TEXT_SUFFIXES
from t5x_like.config.serialization import to_dict
from t5x_like.config.validate import required_vocabulary, validate
from t5x_like.data import text_files

LAYOUTS: tuple[Layout, ...] = ("encoder_decoder", "prefix_lm", "causal_lm", "encoder")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sound_runs_have_no_problems(layout: Layout) -> None:
    assert validate(example(layout)) == []


# Path of the field, a value that it must not have, and what the message must say besides the path.
WRONG: list[tuple[str, Any, str]] = [
    ("name", "../elsewhere", "'../elsewhere'"),
    ("model.vocab_size", 293, "found 293, expected 294"),
    ("model.encoder.num_kv_heads", 3, "3 for 4 heads"),
    ("model.encoder.d_ff", 0, "found 0"),
    ("model.encoder.dropout_rate", 1.0, "found 1, expected a number in [0, 1)"),
    ("model.encoder.norm_epsilon", math.nan, "found nan"),
    ("model.encoder.relative_bias_bidirectional", False, "an encoder sees keys to the right"),
    ("model.encoder.relative_bias_buckets", 31, "found 31"),
    ("model.encoder.relative_bias_max_distance", 8, "more than 8"),
    ("model.embedding_stddev", 0.0, "found 0"),
    ("data.corpus.module", "my.tasks", "'my.tasks' without a task"),
    ("data.corpus.files", ("notes.csv",), "'notes.csv'"),
    ("data.corpus.files", ("texts/*.csv",), "'texts/*.csv'"),
    ("data.corpus.files", ("texts",), "'texts/*.txt'"),
    ("data.corpus.validation_fraction", 1.0, "(0, 1)"),
    ("data.corpus.max_documents", 1, "2 or more"),
    ("data.tokenizer.path", "spiece.model", "bytes have no model file"),
    ("data.mixture.0.rate", 0.0, "found 0"),
    ("data.mixture.0.rate", math.inf, "found inf"),
    ("data.mixture.0.noise_density", 1.0, "(0, 1)"),
    ("data.mixture.0.mean_noise_span_length", 0.5, "found 0.5"),
    ("data.mixture.6.max_target_fraction", 1.5, "found 1.5"),
    ("data.mixture.6.min_target_fraction", -0.1, "found -0.1"),
    ("data.mixture.1.name", "R_3_0.15", "'R_3_0.15'"),
    ("data.seed", -1, "found -1"),
    ("data.prefetch", 0, "found 0"),
    ("training.num_train_steps", 0, "found 0"),
    ("training.batch_size", -8, "found -8"),
    ("training.max_gradient_norm", 0.0, "found 0"),
    ("training.label_smoothing", 1.0, "[0, 1)"),
    ("training.z_loss", -1e-4, "found -0.0001"),
    ("training.optimizer.decay_rate", 0.0, "found 0"),
    ("training.optimizer.momentum", 1.0, "found 1"),
    ("training.schedule.learning_rate", math.nan, "found nan"),
    ("training.schedule.warmup_steps", -1, "found -1"),
    ("training.schedule.final_fraction", 2.0, "found 2"),
    ("partitioning.tensor", 0, "found 0"),
    ("partitioning.tensor", -2, "found -2"),
    ("partitioning.dcn.fsdp", 0, "partitioning.dcn.fsdp: found 0"),
    ("partitioning.parameter_rules", (("embed", "model"),), "'model' for 'embed'"),
    ("checkpoints.keep_last", 0, "found 0"),
    ("checkpoints.keep_every_steps", 1500, "a multiple of save_every_steps, 1000"),
    ("evaluation.every_steps", 0, "found 0"),
    ("monitoring.samples", -1, "found -1"),
]


@pytest.mark.parametrize(("path", "value", "says"), WRONG)
def test_each_problem_is_found_at_its_place(path: str, value: Any, says: str) -> None:
    problems = validate(changed(example(), path, value))
    assert [p.where for p in problems] == [path] or path.startswith(f"{problems[0].where}."), problems
    assert says in str(problems[0])


def test_one_degree_between_slices_is_free_and_it_is_data_by_default() -> None:
    problems = validate(changed(example(), "partitioning.dcn.fsdp", -1))
    assert [(p.where, p.found) for p in problems] == [("partitioning.dcn", "-1 for data and fsdp")]


def test_all_problems_at_once() -> None:
    # Others of the list make up for these: a bias for one direction, and a vocabulary that only a file knows.
    together = [w for w in WRONG if w[0] not in ("model.encoder.relative_bias_buckets", "model.vocab_size")]
    run = example()
    for path, value, _ in together:
        run = changed(run, path, value)
    problems = validate(run)
    assert {path for path, _, _ in together} == {problem.where for problem in problems}
    assert str(ConfigError(problems)).count("\n  - ") == len(problems) > 30


@pytest.mark.parametrize(
    ("layout", "stacks", "fits"),
    [
        (layout, stacks, stacks == want)
        for layout, want in zip(LAYOUTS, ("both", "decoder", "decoder", "encoder"), strict=True)
        for stacks in ("both", "decoder", "encoder")
    ],
)
def test_layout_wants_its_stacks(layout: Layout, stacks: str, fits: bool) -> None:
    run = example(layout)
    model = dataclasses.replace(
        run.model,
        encoder=STACK if stacks != "decoder" else None,
        decoder=STACK if stacks != "encoder" else None,
    )
    found = [p.where for p in validate(dataclasses.replace(run, model=model))]
    assert found == ([] if fits else ["data.layout"])


OBJECTIVES = {
    "span_corruption": SpanCorruption(name="spans"),
    "prefix_lm": PrefixLM(name="prefix"),
    "causal_lm": CausalLM(),
    "masked_lm": MaskedLM(),
    "fill_in_the_middle": FillInTheMiddle(),
    "causal_masking": CausalMasking(),
    "bart": Bart(),
    "blank_infilling": BlankInfilling(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_layout_wants_its_objectives(layout: Layout, kind: str) -> None:
    takes = {
        "encoder_decoder": OBJECTIVES.keys() - {"causal_lm", "masked_lm", "fill_in_the_middle", "causal_masking"},
        "prefix_lm": OBJECTIVES.keys(),
        "causal_lm": OBJECTIVES.keys() - {"masked_lm"},
        "encoder": {"masked_lm"},
    }
    found = [p.where for p in validate(changed(example(layout), "data.mixture", (OBJECTIVES[kind],)))]
    assert found == ([] if kind in takes[layout] else ["data.mixture.0.kind"])


def test_markers_of_fill_in_the_middle_are_no_sentinels_of_spans() -> None:
    run = changed(example("causal_lm"), "data.mixture", (BlankInfilling(),))
    needed = sentinels_needed(BlankInfilling(), "causal_lm", run.data.inputs_length, run.data.targets_length)
    run = changed(run, "data.tokenizer.num_sentinels", needed)
    assert not validate(run)
    both = changed(run, "data.mixture", (BlankInfilling(), FillInTheMiddle()))
    (problem,) = validate(both)
    assert problem.where == "data.mixture.0" and f"to {needed + 3}" in problem.fix
    assert not validate(changed(both, "data.tokenizer.num_sentinels", needed + 3))


def test_spans_need_cells_for_their_targets() -> None:
    run = changed(example("prefix_lm"), "data.targets_length", 0)
    assert [p.where for p in validate(run)] == ["data.targets_length"]
    causal = changed(example("causal_lm"), "data.targets_length", 0)
    assert validate(causal) == []


def test_encoder_has_no_targets() -> None:
    assert [p.where for p in validate(changed(example("encoder"), "data.targets_length", 8))] == ["data.targets_length"]


@pytest.mark.parametrize("layout", ["encoder_decoder", "prefix_lm"])
def test_sentinels_are_counted(layout: Layout) -> None:
    """The message names both numbers, and following it mends the run."""
    run = changed(example(layout), "data.tokenizer.num_sentinels", 5)
    spans = [o for o in run.data.mixture if isinstance(o, SpanCorruption)]
    needed = [sentinels_needed(o, layout, 64, 64) for o in spans]
    problems = validate(run)
    assert [p.where for p in problems] == [f"data.mixture.{i}" for i, n in enumerate(needed) if n > 5]
    assert needed[2] == 16, "half of 92 tokens in spans of 3, and one of these cut in two"
    worst = next(p for p in problems if p.where == "data.mixture.2")
    assert "'X_3_0.5', which can need 16 sentinels in a window of" in worst.found
    assert worst.expected.endswith(", 5") and "num_sentinels to 16" in worst.fix
    assert validate(changed(run, "data.tokenizer.num_sentinels", max(needed))) == []


def test_window_without_room() -> None:
    run = changed(changed(example(), "data.inputs_length", 64), "data.targets_length", 2)
    problems = validate(run)
    for index, objective in enumerate(run.data.mixture):
        window = raw_window_length(objective, "encoder_decoder", 64, 2)
        assert (f"data.mixture.{index}" in [p.where for p in problems]) == (window < 2)
    assert problems and "inputs_length 64, targets_length 2" in problems[0].found


def test_prefix_needs_buckets_for_both_directions() -> None:
    run = changed(example("prefix_lm"), "model.decoder.relative_bias_bidirectional", False)
    assert [p.where for p in validate(run)] == ["model.decoder.relative_bias_bidirectional"]
    assert validate(changed(run, "model.decoder.positions", "rope")) == []
    assert validate(changed(example("causal_lm"), "model.decoder.relative_bias_bidirectional", False)) == []


@pytest.mark.parametrize(
    ("layout", "stack", "cells"),
    [("encoder_decoder", "encoder", 64), ("encoder_decoder", "decoder", 64), ("prefix_lm", "decoder", 128)],
)
def test_learned_positions_reach_the_end_of_a_row(layout: Layout, stack: str, cells: int) -> None:
    run = changed(example(layout), f"model.{stack}.positions", "learned")
    assert validate(changed(run, f"model.{stack}.max_positions", cells)) == []
    problems = validate(changed(run, f"model.{stack}.max_positions", cells - 1))
    assert [p.where for p in problems] == [f"model.{stack}.max_positions"]
    assert f"{cells - 1} for rows of {cells}" in problems[0].found


def test_rope_turns_pairs() -> None:
    run = changed(changed(example("causal_lm"), "model.decoder.positions", "rope"), "model.decoder.head_dim", 7)
    assert [p.where for p in validate(run)] == ["model.decoder.head_dim"]


def test_stacks_share_a_width() -> None:
    problems = validate(changed(example(), "model.decoder.d_model", 48))
    assert [p.where for p in problems] == ["model.decoder.d_model"]
    assert "48 beside model.encoder.d_model 32" in problems[0].found


def test_batch_divides_into_parts() -> None:
    problems = validate(changed(example(), "training.gradient_accumulation_steps", 3))
    assert [(p.where, p.found) for p in problems] == [("training.batch_size", "8 rows in 3 parts")]


def test_one_source_of_documents() -> None:
    corpus = CorpusConfig(files=("a.txt",), tfds="wikipedia", task="c4")
    problems = validate(changed(example(), "data.corpus", corpus))
    assert [(p.where, p.found) for p in problems] == [("data.corpus", "files and tfds and task")]


@pytest.mark.parametrize(
    ("corpus", "says"),
    [
        (CorpusConfig(inputs_field="q"), "'q' of the embedded corpus"),
        (CorpusConfig(files=("a.jsonl", "b.txt"), inputs_field="q"), "'q' of 'b.txt'"),
        (CorpusConfig(files=("a.jsonl",), inputs_field="text"), "another field than the targets'"),
        (CorpusConfig(task="c4", inputs_field="targets"), "another field than the targets'"),
        (CorpusConfig(files=("a.jsonl",), inputs_field=""), "the name of a field"),
        (CorpusConfig(files=("a.jsonl", "b.parquet"), inputs_field="q"), None),
        (CorpusConfig(task="c4", inputs_field="inputs"), None),
    ],
)
def test_pairs_come_from_sources_with_fields(corpus: CorpusConfig, says: str | None) -> None:
    problems = [p for p in validate(changed(example(), "data.corpus", corpus)) if p.where == "data.corpus.inputs_field"]
    assert [says in str(p) for p in problems] == ([] if says is None else [True])


def test_a_tasks_vocabulary_needs_a_task() -> None:
    run = changed(example(), "data.tokenizer", TokenizerConfig(kind="task", path="a.model"))
    found = [str(p) for p in validate(run) if p.where.startswith("data.tokenizer")]
    assert len(found) == 2 and "'task' without a seqio Task" in found[0] and "the Task has its own" in found[1]
    run = changed(run, "data.corpus", CorpusConfig(task="c4"))
    run = changed(run, "data.tokenizer", TokenizerConfig(kind="task"))
    assert not [p for p in validate(run) if p.where.startswith(("data.tokenizer", "data.corpus"))]


@pytest.mark.parametrize(
    "pattern", ["a.txt", "*.jsonl", "texts/**/*.jsonl.gz", "data-*.parquet", "texts/*", "/a b/ä?.txt"]
)
def test_patterns_of_files(pattern: str) -> None:
    assert validate(changed(example(), "data.corpus.files", (pattern,))) == []


def test_kinds_of_files_are_those_that_are_read() -> None:
    assert set(TEXT_SUFFIXES) == set(text_files._READERS)


def test_at_most_one_free_degree() -> None:
    problems = validate(changed(example(), "partitioning", PartitioningConfig(data=-1, fsdp=-1)))
    assert [(p.where, p.found) for p in problems] == [("partitioning", "-1 for data and fsdp")]


@pytest.mark.parametrize(
    ("tokenizer", "size"),
    [
        (TokenizerConfig(kind="bytes", num_sentinels=100), 3 + 256 + 100 + 3),
        (TokenizerConfig(vocab_size=4096, num_sentinels=64), 4096 + 64 + 3),
        (TokenizerConfig(path="spiece.model"), None),
    ],
)
def test_required_vocabulary(tokenizer: TokenizerConfig, size: int | None) -> None:
    assert required_vocabulary(tokenizer) == size
    run = changed(changed(example("causal_lm"), "data.tokenizer", tokenizer), "model.vocab_size", (size or 4000) - 1)
    problems = validate(run)
    assert [p.where for p in problems] == (["model.vocab_size"] if size else [])
    assert not size or (str(size) in problems[0].expected and str(size - 1) in problems[0].found)


def test_warm_up_ends_before_the_decay_does() -> None:
    schedule = Schedule(kind="cosine", warmup_steps=100, decay_steps=50)
    assert [p.where for p in validate(changed(example(), "training.schedule", schedule))] == [
        "training.schedule.warmup_steps"
    ]


def leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return [(path, value)]
    return [leaf for name, child in items for leaf in leaves(child, f"{path}.{name}".lstrip("."))]


NUMBERS = [
    (layout, path, value)
    for layout in LAYOUTS
    for run in (changed(example(layout), "training.optimizer", AdamW()), example(layout))
    for path, value in leaves(to_dict(run))
    if isinstance(value, int | float) and path != "schema_version"
]


@given(data=st.data(), number_of_changes=st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_no_number_makes_validation_fail_itself(data: st.DataObject, number_of_changes: int) -> None:
    """Whatever numbers stand in a run, the answer is a list of problems, never an exception."""
    layout = data.draw(st.sampled_from(LAYOUTS))
    run: RunConfig = example(layout)
    known = dict(leaves(to_dict(run)))
    for _ in range(number_of_changes):
        path = data.draw(st.sampled_from([path for where, path, _ in NUMBERS if where == layout and path in known]))
        if isinstance(known[path], bool):
            value: Any = data.draw(st.booleans())
        elif isinstance(known[path], int):
            value = data.draw(st.integers(-3, 300))
        else:
            value = data.draw(st.floats(width=32))
        run = changed(run, path, value)
    assert all(isinstance(problem, Problem) and problem.where and problem.expected for problem in validate(run))
