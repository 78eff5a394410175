"""Validation reports every problem of a configuration, with path, value and expectation, together with all others."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from helpers.config_examples import STACK, changed, example
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.config import (
    AdamWConfig,
    BartDenoising,
    BlankInfilling,
    CausalLM,
    CausalMasking,
    CorpusConfig,
    EarlyStopping,
    FillInTheMiddle,
    KeepBest,
    MaskedDiffusion,
    MaskedLM,
    PrefixLM,
    RunConfig,
    ScheduleConfig,
    ShardingConfig,
    SpanCorruption,
    TokenizerConfig,
)
from t5x_like.config.corpus import TABLE_SUFFIXES, TEXT_SUFFIXES
from t5x_like.config.objectives import Layout
from t5x_like.config.seqio_task import EvaluationTask
from t5x_like.config.serialization import to_dict
from t5x_like.config.validation import required_vocabulary, validate
from t5x_like.data.sources import text_files
from t5x_like.errors import ConfigError, ConfigProblem

LAYOUTS: tuple[Layout, ...] = ("encoder_decoder", "prefix_lm", "causal_lm", "encoder")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_valid_runs_have_no_problems(layout: Layout) -> None:
    assert validate(example(layout)) == []


# Path of a field, an invalid value, and text that the message must contain besides the path.
WRONG: list[tuple[str, Any, str]] = [
    ("name", "../elsewhere", "'../elsewhere'"),
    ("model.vocab_size", 293, "found 293, expected 294"),
    ("model.encoder.num_kv_heads", 3, "3 for 4 heads"),
    ("model.encoder.d_ff", 0, "found 0"),
    ("model.encoder.dropout_rate", 1.0, "found 1, expected a number in [0, 1)"),
    ("model.encoder.norm_epsilon", math.nan, "found nan"),
    ("model.encoder.relative_bias_bidirectional", False, "an encoder attends to keys to the right"),
    ("model.encoder.relative_bias_buckets", 3, "found 3"),
    ("model.encoder.relative_bias_max_distance", 8, "more than 8"),
    ("model.embedding_stddev", 0.0, "found 0"),
    ("data.corpus.module", "my.tasks", "'my.tasks' without a task"),
    ("data.corpus.files", ("notes.pdf",), "'notes.pdf'"),
    ("data.corpus.files", ("texts/*.parquet.gz",), "'texts/*.parquet.gz'"),
    ("data.corpus.text_field", "{title", "a template"),
    ("data.corpus.validation_fraction", 1.0, "(0, 1)"),
    ("data.corpus.max_documents", 1, "2 or more"),
    ("data.tokenizer.path", "spiece.model", "kind bytes has no model file"),
    ("data.mixture.0.rate", 0.0, "found 0"),
    ("data.mixture.0.rate", math.inf, "found inf"),
    ("data.mixture.0.noise_density", 1.0, "(0, 1)"),
    ("data.mixture.0.mean_noise_span_length", 0.5, "found 0.5"),
    ("data.mixture.6.max_target_fraction", 1.5, "found 1.5"),
    ("data.mixture.6.min_target_fraction", -0.1, "found -0.1"),
    ("data.mixture.1.name", "R_3_0.15", "'R_3_0.15'"),
    ("data.seed", -1, "found -1"),
    ("data.prefetch_batches", 0, "found 0"),
    ("training.num_train_steps", 0, "found 0"),
    ("training.global_batch_size", -8, "found -8"),
    ("training.max_gradient_norm", 0.0, "found 0"),
    ("training.label_smoothing", 1.0, "[0, 1)"),
    ("training.z_loss", -1e-4, "found -0.0001"),
    ("training.optimizer.decay_rate", 0.0, "found 0"),
    ("training.optimizer.momentum", 1.0, "found 1"),
    ("training.schedule.learning_rate", math.nan, "found nan"),
    ("training.schedule.warmup_steps", -1, "found -1"),
    ("training.schedule.final_fraction", 2.0, "found 2"),
    ("sharding.tensor", 0, "found 0"),
    ("sharding.tensor", -2, "found -2"),
    ("sharding.dcn.fsdp", 0, "sharding.dcn.fsdp: found 0"),
    ("sharding.parameter_rules", (("embed", "model"),), "'model' for 'embed'"),
    ("checkpoints.max_to_keep", 0, "found 0"),
    ("checkpoints.keep_period", 1500, "a multiple of save_every_steps, 1000"),
    ("evaluation.every_steps", 0, "found 0"),
    ("monitoring.num_decoded_samples", -1, "found -1"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG)
def test_problem_is_reported_at_the_path_of_its_field(path: str, value: Any, message: str) -> None:
    problems = validate(changed(example(), path, value))
    assert [p.where for p in problems] == [path] or path.startswith(f"{problems[0].where}."), problems
    assert message in str(problems[0])


def test_scores_that_decide_about_checkpoints_exist_and_are_saved() -> None:
    def problems(metric: str, every: int | None = 2000, run: RunConfig | None = None) -> list[tuple[str, str]]:
        run = changed(run or example(), "evaluation.every_steps", every)
        run = changed(run, "checkpoints.keep_best", KeepBest(metric=metric))
        return [(problem.where, problem.expected) for problem in validate(run)]

    assert problems("loss/R_3_0.15") == problems("accuracy/S") == problems("bits_per_byte") == []
    ((where, expected),) = problems("loss/other")
    assert where == "checkpoints.keep_best.metric" and "METRIC/R_3_0.15" in expected and "bits_per_byte" in expected
    assert [where for where, _ in problems("loss/S", every=None)] == ["checkpoints.keep_best"]
    assert [where for where, _ in problems("loss/S", every=1500)] == ["evaluation.every_steps"]
    assert [where for where, _ in problems("bits_per_byte", run=example("encoder"))] == ["checkpoints.keep_best.metric"]
    assert problems("bits_per_byte_bound", run=example("encoder")) == []
    assert [where for where, _ in problems("bits_per_byte_bound")] == ["checkpoints.keep_best.metric"]
    # The metrics of a Task are known at its first evaluation only.
    of_task = changed(example(), "evaluation.tasks", (EvaluationTask(mixture_or_task="squad"),))
    assert problems("squad/em", run=of_task) == []
    stopping = changed(example(), "evaluation.early_stopping", EarlyStopping(metric="loss/S"))
    assert [problem.where for problem in validate(stopping)] == ["evaluation.early_stopping"]


def test_one_degree_between_slices_is_inferred_by_default_that_of_data() -> None:
    problems = validate(changed(example(), "sharding.dcn.fsdp", -1))
    assert [(p.where, p.found) for p in problems] == [("sharding.dcn", "-1 for data and fsdp")]


def test_all_problems_are_reported_at_once() -> None:
    # Other changes of the list hide these two: a unidirectional bias, and a vocabulary that only a file defines.
    together = [w for w in WRONG if w[0] not in ("model.encoder.relative_bias_buckets", "model.vocab_size")]
    run = example()
    for path, value, _ in together:
        run = changed(run, path, value)
    problems = validate(run)
    assert {path for path, _, _ in together} == {problem.where for problem in problems}
    message = str(ConfigError(problems))
    assert len(problems) > 30
    assert [p for p in problems if f"found {p.found}, expected {p.expected}" not in message] == []


@pytest.mark.parametrize(
    ("layout", "stacks", "fits"),
    [
        (layout, stacks, stacks == want)
        for layout, want in zip(LAYOUTS, ("both", "decoder", "decoder", "encoder"), strict=True)
        for stacks in ("both", "decoder", "encoder")
    ],
)
def test_layout_requires_its_stacks(layout: Layout, stacks: str, fits: bool) -> None:
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
    "masked_diffusion": MaskedDiffusion(),
    "fill_in_the_middle": FillInTheMiddle(),
    "causal_masking": CausalMasking(),
    "bart": BartDenoising(),
    "blank_infilling": BlankInfilling(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_layout_requires_its_objectives(layout: Layout, kind: str) -> None:
    in_place = {"masked_lm", "masked_diffusion"}
    takes = {
        "encoder_decoder": OBJECTIVES.keys() - {"causal_lm", *in_place, "fill_in_the_middle", "causal_masking"},
        "prefix_lm": OBJECTIVES.keys(),
        "causal_lm": OBJECTIVES.keys() - in_place,
        "encoder": in_place,
    }
    found = [p.where for p in validate(changed(example(layout), "data.mixture", (OBJECTIVES[kind],)))]
    assert found == ([] if kind in takes[layout] else ["data.mixture.0.kind"])


def test_markers_of_fill_in_the_middle_are_not_sentinels_of_spans() -> None:
    run = changed(example("causal_lm"), "data.mixture", (BlankInfilling(),))
    needed = BlankInfilling().sentinels_needed(
        BlankInfilling().raw_window_length("causal_lm", run.data.inputs_length, run.data.targets_length)
    )
    run = changed(run, "data.tokenizer.num_sentinels", needed)
    assert not validate(run)
    both = changed(run, "data.mixture", (BlankInfilling(), FillInTheMiddle()))
    (problem,) = validate(both)
    assert problem.where == "data.mixture.0" and f"to {needed + 3}" in problem.fix
    assert not validate(changed(both, "data.tokenizer.num_sentinels", needed + 3))


def test_span_corruption_requires_positions_for_targets() -> None:
    run = changed(example("prefix_lm"), "data.targets_length", 0)
    assert [p.where for p in validate(run)] == ["data.targets_length"]
    causal = changed(example("causal_lm"), "data.targets_length", 0)
    assert validate(causal) == []


def test_encoder_has_no_targets() -> None:
    assert [p.where for p in validate(changed(example("encoder"), "data.targets_length", 8))] == ["data.targets_length"]


@pytest.mark.parametrize("layout", ["encoder_decoder", "prefix_lm"])
def test_sentinels_are_counted(layout: Layout) -> None:
    """The message states both numbers, and following its advice gives a valid run."""
    run = changed(example(layout), "data.tokenizer.num_sentinels", 5)
    spans = [o for o in run.data.mixture if isinstance(o, SpanCorruption)]
    needed = [o.sentinels_needed(o.raw_window_length(layout, 64, 64)) for o in spans]
    problems = validate(run)
    assert [p.where for p in problems] == [f"data.mixture.{i}" for i, n in enumerate(needed) if n > 5]
    assert needed[2] == 16, "half of 92 tokens in spans of 3, and one of these cut in two"
    worst = next(p for p in problems if p.where == "data.mixture.2")
    assert "'X_3_0.5', which can need 16 sentinels in a window of" in worst.found
    assert worst.expected.endswith(", 5") and "num_sentinels to 16" in worst.fix
    assert validate(changed(run, "data.tokenizer.num_sentinels", max(needed))) == []


def test_rows_too_short_for_a_window() -> None:
    run = changed(changed(example(), "data.inputs_length", 64), "data.targets_length", 2)
    problems = validate(run)
    for index, objective in enumerate(run.data.mixture):
        window = objective.raw_window_length("encoder_decoder", 64, 2)
        assert (f"data.mixture.{index}" in [p.where for p in problems]) == (window < 2)
    assert problems and "inputs_length 64, targets_length 2" in problems[0].found


def test_prefix_needs_buckets_for_both_directions() -> None:
    run = changed(example("prefix_lm"), "model.decoder.relative_bias_bidirectional", False)
    assert [p.where for p in validate(run)] == ["model.decoder.relative_bias_bidirectional"]
    assert validate(changed(run, "model.decoder.positions", "rope")) == []
    assert validate(changed(example("causal_lm"), "model.decoder.relative_bias_bidirectional", False)) == []


@pytest.mark.parametrize(
    ("layout", "stack", "positions"),
    [("encoder_decoder", "encoder", 64), ("encoder_decoder", "decoder", 64), ("prefix_lm", "decoder", 128)],
)
def test_learned_positions_cover_the_whole_row(layout: Layout, stack: str, positions: int) -> None:
    run = changed(example(layout), f"model.{stack}.positions", "learned")
    assert validate(changed(run, f"model.{stack}.max_positions", positions)) == []
    problems = validate(changed(run, f"model.{stack}.max_positions", positions - 1))
    assert [p.where for p in problems] == [f"model.{stack}.max_positions"]
    assert f"{positions - 1} for rows of {positions}" in problems[0].found


def test_rope_requires_an_even_head_dim() -> None:
    run = changed(changed(example("causal_lm"), "model.decoder.positions", "rope"), "model.decoder.head_dim", 7)
    assert [p.where for p in validate(run)] == ["model.decoder.head_dim"]


def test_stacks_must_have_the_same_width() -> None:
    problems = validate(changed(example(), "model.decoder.d_model", 48))
    assert [p.where for p in problems] == ["model.decoder.d_model"]
    assert "48 beside model.encoder.d_model 32" in problems[0].found


def test_batch_size_must_be_a_multiple_of_the_accumulation_steps() -> None:
    problems = validate(changed(example(), "training.gradient_accumulation_steps", 3))
    assert [(p.where, p.found) for p in problems] == [("training.global_batch_size", "8 rows in 3 parts")]


def test_corpus_has_one_source_of_documents() -> None:
    corpus = CorpusConfig(files=("a.txt",), tfds="wikipedia", task="c4")
    problems = validate(changed(example(), "data.corpus", corpus))
    assert [(p.where, p.found) for p in problems] == [("data.corpus", "files and tfds and task")]


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (CorpusConfig(validation_files=("a.jsonl",)), "files without training files"),
        (CorpusConfig(files=("a.jsonl",), test_files=("b.jsonl",), test_split="test"), "a split beside test_files"),
        (CorpusConfig(key_field="source"), "a key of the embedded corpus"),
        (CorpusConfig(tfds="c4", generator="mine"), "tfds and generator"),
    ],
)
def test_splits_and_keys_belong_to_a_source(corpus: CorpusConfig, message: str) -> None:
    assert [message in str(problem) for problem in validate(changed(example(), "data.corpus", corpus))] == [True]


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (CorpusConfig(inputs_field="q"), "'q' of the embedded corpus"),
        (CorpusConfig(files=("a.jsonl", "b.txt"), inputs_field="q"), "'q' of 'b.txt'"),
        (CorpusConfig(files=("a.jsonl",), inputs_field="text"), "a field other than the field of the targets"),
        (CorpusConfig(task="c4", inputs_field="targets"), "a field other than the field of the targets"),
        (CorpusConfig(files=("a.jsonl",), inputs_field=""), "the name of a field"),
        (CorpusConfig(files=("a.jsonl", "b.parquet"), inputs_field="q"), None),
        (CorpusConfig(task="c4", inputs_field="inputs"), None),
    ],
)
def test_pairs_come_from_sources_with_fields(corpus: CorpusConfig, message: str | None) -> None:
    problems = [p for p in validate(changed(example(), "data.corpus", corpus)) if p.where == "data.corpus.inputs_field"]
    assert [message in str(p) for p in problems] == ([] if message is None else [True])


def test_vocabulary_of_a_task_requires_a_task() -> None:
    run = changed(example(), "data.tokenizer", TokenizerConfig(kind="task", path="a.model"))
    found = [str(p) for p in validate(run) if p.where.startswith("data.tokenizer")]
    assert len(found) == 2 and "'task' without a seqio Task" in found[0] and "the Task has its own" in found[1]
    run = changed(run, "data.corpus", CorpusConfig(task="c4"))
    run = changed(run, "data.tokenizer", TokenizerConfig(kind="task"))
    assert not [p for p in validate(run) if p.where.startswith(("data.tokenizer", "data.corpus"))]


@pytest.mark.parametrize(
    "pattern", ["a.txt", "*.jsonl", "texts/**/*.jsonl.gz", "data-*.parquet", "texts/*", "/a b/ä?.txt"]
)
def test_valid_file_patterns(pattern: str) -> None:
    assert validate(changed(example(), "data.corpus.files", (pattern,))) == []


def test_valid_suffixes_are_those_with_a_reader() -> None:
    assert {*TEXT_SUFFIXES, *TABLE_SUFFIXES} == set(text_files.FORMATS)


def test_at_most_one_degree_is_inferred() -> None:
    problems = validate(changed(example(), "sharding", ShardingConfig(data=-1, fsdp=-1)))
    assert [(p.where, p.found) for p in problems] == [("sharding", "-1 for data and fsdp")]


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


def test_warmup_must_end_before_the_decay() -> None:
    schedule = ScheduleConfig(kind="cosine", warmup_steps=100, decay_steps=50)
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
    for run in (changed(example(layout), "training.optimizer", AdamWConfig()), example(layout))
    for path, value in leaves(to_dict(run))
    if isinstance(value, int | float) and path != "schema_version"
]


@given(data=st.data(), number_of_changes=st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_validation_never_raises(data: st.DataObject, number_of_changes: int) -> None:
    """For arbitrary numbers in a run the result is a list of problems, never an exception."""
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
    assert all(isinstance(problem, ConfigProblem) and problem.where and problem.expected for problem in validate(run))
