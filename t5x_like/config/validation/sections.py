"""Problems of the sections other than the model that concern several fields, or text in a format of its own."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence

from t5x_like.config.bounds import Problems
from t5x_like.config.continuation import has_bound
from t5x_like.config.corpus import (
    RECORD_SUFFIXES,
    TABLE_SUFFIXES,
    CorpusConfig,
    expected_formats,
    file_format,
    parse_field,
)
from t5x_like.config.initialization import IDENTITY, InitializeFrom
from t5x_like.config.run import CheckpointConfig, EvaluationConfig, MonitoringConfig, RunConfig
from t5x_like.config.sharding import AXES, DcnConfig, ShardingConfig
from t5x_like.config.tokenizer import TokenizerConfig
from t5x_like.config.training import FreezeConfig, ScheduleConfig, TrainingConfig
from t5x_like.errors import ConfigProblem
from t5x_like.utils.trusted_urls import location_problems


def corpus_problems(corpus: CorpusConfig, where: str = "data.corpus") -> Problems:
    """Yield the problems of a corpus that concern several fields, and of its file patterns."""
    sources = {"files": corpus.files, "tfds": corpus.tfds, "task": corpus.task, "generator": corpus.generator}
    given = [name for name, value in sources.items() if value]
    if len(given) > 1:
        yield ConfigProblem(where, " and ".join(given), "one source of documents", "remove the others")
    if corpus.module and not corpus.task:
        yield ConfigProblem(
            f"{where}.module", f"{corpus.module!r} without a task", "the task that this module registers"
        )
    for name in ("files", "validation_files", "test_files"):
        patterns = getattr(corpus, name)
        if patterns and not corpus.files:
            yield ConfigProblem(f"{where}.{name}", "files without training files", "data.corpus.files")
        for pattern in patterns:
            yield from _pattern_problems(pattern, f"{where}.{name}")
    for files, split in (("validation_files", "validation_split"), ("test_files", "test_split")):
        if getattr(corpus, files) and getattr(corpus, split):
            yield ConfigProblem(f"{where}.{split}", f"a split beside {files}", "one of the two")
    if not given and corpus.key_field is not None:
        yield ConfigProblem(f"{where}.key_field", "a key of the embedded corpus", "a source with fields")
    fields = {name: getattr(corpus, name) for name in ("text_field", "inputs_field", "rejected_field", "key_field")}
    fields |= {f"negative_fields.{index}": field for index, field in enumerate(corpus.negative_fields)}
    for name, field in fields.items():
        try:
            parse_field(field or "text")
        except ValueError as error:
            expected = "a field, or a template such as '{title}: {body}', in which {{ and }} are braces"
            yield ConfigProblem(f"{where}.{name}", f"{field!r} ({error})", expected)
    if corpus.inputs_field is not None:
        yield from _pairs_problems(corpus, where)
    if corpus.rejected_field is not None:
        yield from _preference_problems(corpus, where)
    if corpus.negative_fields or corpus.num_negatives:
        yield from _negatives_problems(corpus, where)
    if corpus.messages_field is not None and corpus.inputs_field is not None:
        yield ConfigProblem(f"{where}.inputs_field", "a field of inputs beside messages_field", "one of the two")
    if corpus.messages_field is not None and not corpus.files:
        yield ConfigProblem(f"{where}.messages_field", "messages without files", "data.corpus.files")
    classes = corpus.target_kind in ("label", "token_labels")
    if corpus.target_kind != "text" and corpus.inputs_field is None:
        yield ConfigProblem(
            f"{where}.inputs_field", f"none, with targets of kind {corpus.target_kind}", "the field of the text"
        )
    if classes != bool(corpus.labels):
        found = "no labels" if classes else f"{len(corpus.labels)} labels for targets of kind {corpus.target_kind}"
        yield ConfigProblem(f"{where}.labels", found, "labels if, and only if, target_kind is label or token_labels")
    for label in corpus.labels:
        if not label.strip() or (corpus.target_kind == "token_labels" and len(label.split()) > 1):
            yield ConfigProblem(f"{where}.labels", repr(label), "a name; for token_labels, one without spaces")
    if len(set(corpus.labels)) < len(corpus.labels):
        yield ConfigProblem(f"{where}.labels", "a label twice", "each label once")


def _pattern_problems(pattern: str, where: str) -> Problems:
    """Yield the problem of a path or glob, as far as it can be seen without the file system."""
    # The suffix that a trailing wildcard matches is known only when the files are listed. A name without a suffix may
    # be a folder that `datasets` wrote.
    last = pattern[pattern.rfind("*") + 1 :] if "*" in pattern else pattern.rpartition("/")[2]
    if not pattern or ("." in last and file_format(last) is None):
        yield ConfigProblem(where, repr(pattern), f"paths or globs of files in {expected_formats()}")


def _pairs_problems(corpus: CorpusConfig, where: str) -> Problems:
    """Yield the problems of supervised pairs, whose source must have fields."""
    field = f"{where}.inputs_field"
    if not corpus.inputs_field:
        yield ConfigProblem(field, "nothing", "the name of a field, or None for plain text")
    if not (corpus.files or corpus.tfds or corpus.task or corpus.generator):
        yield ConfigProblem(
            field,
            f"{corpus.inputs_field!r} of the embedded corpus",
            "files, tfds, task or generator, which have pairs",
        )
    for pattern in (*corpus.files, *corpus.validation_files, *corpus.test_files):
        if (file_format(pattern) or ("",))[0] == ".txt":
            expected = f"files with fields: {', '.join(RECORD_SUFFIXES)} or {', '.join(TABLE_SUFFIXES)}"
            yield ConfigProblem(field, f"{corpus.inputs_field!r} of {pattern!r}", expected)
    targets = "targets" if corpus.task else corpus.text_field
    if corpus.inputs_field == targets:
        yield ConfigProblem(
            field, f"{targets!r}, which holds the targets", "a field other than the field of the targets"
        )


def _preference_problems(corpus: CorpusConfig, where: str) -> Problems:
    """Yield the problems of preference pairs: files with a prompt and two answers."""
    field = f"{where}.rejected_field"
    if corpus.inputs_field is None and corpus.messages_field is None:
        expected = "the field of the prompt, or messages_field"
        yield ConfigProblem(f"{where}.inputs_field", "none, beside rejected_field", expected)
    if not corpus.files:
        yield ConfigProblem(field, f"{corpus.rejected_field!r} without files", "data.corpus.files")
    if corpus.rejected_field in (corpus.inputs_field, corpus.text_field):
        expected = "a field other than those of the prompt and of the chosen answer"
        yield ConfigProblem(field, repr(corpus.rejected_field), expected)
    if corpus.target_kind != "text":
        yield ConfigProblem(f"{where}.target_kind", f"{corpus.target_kind} beside rejected_field", "text")


def _negatives_problems(corpus: CorpusConfig, where: str) -> Problems:
    """Yield the problems of hard negatives, which are further texts of pairs in files."""
    field = f"{where}.negative_fields"
    if not corpus.negative_fields:
        yield ConfigProblem(field, "none, beside num_negatives", "the fields of the hard negatives")
    if corpus.inputs_field is None or corpus.rejected_field is not None or corpus.target_kind != "text":
        expected = "inputs_field and text_field, of two texts that match"
        yield ConfigProblem(field, "hard negatives of a corpus without matching texts", expected)
    if not corpus.files:
        yield ConfigProblem(field, "hard negatives without files", "data.corpus.files")
    if {corpus.inputs_field, corpus.text_field} & set(corpus.negative_fields):
        expected = "fields other than those of the texts that match"
        yield ConfigProblem(field, ", ".join(map(repr, corpus.negative_fields)), expected)


def tokenizer_problems(tokenizer: TokenizerConfig, corpora: Sequence[CorpusConfig]) -> Problems:
    """Yield the problems of a tokenizer for these corpora."""
    where = "data.tokenizer"
    yield from location_problems(tokenizer.path or "", f"{where}.path")
    if tokenizer.kind == "task" and not any(corpus.task for corpus in corpora):
        yield ConfigProblem(
            f"{where}.kind", "'task' without a seqio Task", "a corpus that names one", "or kind sentencepiece"
        )
    if tokenizer.kind == "task" and tokenizer.path:
        yield ConfigProblem(
            f"{where}.path", repr(tokenizer.path), "none: the Task has its own vocabulary", "or kind sentencepiece"
        )
    if tokenizer.kind == "bytes" and tokenizer.path:
        yield ConfigProblem(
            f"{where}.path", repr(tokenizer.path), "none: kind bytes has no model file", "or kind sentencepiece"
        )


def inconsistent_training(training: TrainingConfig) -> Problems:
    """Yield the problems of the training section that concern several fields, and of its regular expressions."""
    parts = training.gradient_accumulation_steps
    if parts > 0 and training.global_batch_size % parts:
        yield ConfigProblem(
            "training.global_batch_size",
            f"{training.global_batch_size} rows in {parts} parts",
            f"a multiple of gradient_accumulation_steps, {parts}",
        )
    if training.parameter_type != "float32" and training.lora is not None:
        expected = (
            "float32 with training.lora, whose adapters are small; the type of its base is training.lora.base_type"
        )
        yield ConfigProblem("training.parameter_type", training.parameter_type, expected)
    yield from _batch_size_ramp(training)
    yield from training.optimizer.problems("training.optimizer")
    yield from _schedule("training.schedule", training.schedule)
    yield from _freeze("training.freeze", training.freeze)


def _batch_size_ramp(training: TrainingConfig) -> Problems:
    before = 0
    parts = max(training.gradient_accumulation_steps, 1)
    for index, stage in enumerate(training.batch_size_ramp):
        where = f"training.batch_size_ramp.{index}"
        if stage.until_step <= before:
            yield ConfigProblem(f"{where}.until_step", str(stage.until_step), f"a step after {before}")
        before = stage.until_step
        if stage.batch_size > training.global_batch_size:
            expected = f"at most training.global_batch_size, {training.global_batch_size}"
            yield ConfigProblem(f"{where}.batch_size", str(stage.batch_size), expected)
        if stage.batch_size % parts:
            found = f"{stage.batch_size} rows in {parts} parts"
            yield ConfigProblem(f"{where}.batch_size", found, f"a multiple of gradient_accumulation_steps, {parts}")
    distillation = training.distillation
    if training.batch_size_ramp and distillation is not None and distillation.top_k is not None:
        expected = "None with batch_size_ramp: stored distributions are for batches of one size"
        yield ConfigProblem("training.distillation.top_k", str(distillation.top_k), expected)


def _freeze(where: str, freeze: Sequence[FreezeConfig]) -> Problems:
    for index, entry in enumerate(freeze):
        yield from patterns(f"{where}.{index}.paths", entry.paths)


def patterns(where: str, expressions: Sequence[str]) -> Problems:
    """Yield a problem for each invalid regular expression."""
    for index, pattern in enumerate(expressions):
        try:
            re.compile(pattern)
        except re.error as error:
            yield ConfigProblem(f"{where}.{index}", repr(pattern), f"a regular expression ({error})")


def inconsistent_initialization(source: InitializeFrom) -> Problems:
    """Yield the problems of rename rules and patterns, and of fields that exclude each other."""
    where = "initialize_from"
    yield from location_problems(source.directory, f"{where}.directory")
    for index, (pattern, replacement) in enumerate(source.rename_rules):
        try:
            # `sub` parses the replacement even if nothing matches.
            re.sub(pattern, replacement, "")
        except (re.error, IndexError) as error:
            found = f"{pattern!r} -> {replacement!r}"
            expected = f"a regular expression and a replacement ({error})"
            yield ConfigProblem(f"{where}.rename_rules.{index}", found, expected)
    if source.restore_optimizer and (source.rename_rules != IDENTITY or source.reinit or source.resize):
        yield ConfigProblem(
            f"{where}.restore_optimizer", "True with rules", "False: the optimizer state fits the same model only"
        )
    yield from patterns(f"{where}.reinit", source.reinit)
    yield from patterns(f"{where}.resize", source.resize)


def _schedule(where: str, schedule: ScheduleConfig) -> Problems:
    end = schedule.decay_steps
    if schedule.kind in ("cosine", "wsd") and end is not None and 0 < end < schedule.warmup_steps:
        yield ConfigProblem(
            f"{where}.warmup_steps", f"{schedule.warmup_steps}, beyond decay_steps {end}", f"{end} or fewer"
        )


def sharding_problems(sharding: ShardingConfig) -> Problems:
    """Yield the problems of the sharding section that do not depend on the devices."""
    for where, degrees, devices in (
        ("sharding", sharding.degrees, "devices"),
        ("sharding.dcn", sharding.dcn.degrees, "slices"),
    ):
        yield from degrees_problems(where, degrees, devices)
    defaults = ShardingConfig()
    without_degrees = dataclasses.replace(sharding, **{axis: getattr(defaults, axis) for axis in AXES}, dcn=DcnConfig())
    if sharding.auto and without_degrees != sharding:
        fix = "remove the degrees, or set sharding.auto to False"
        yield ConfigProblem("sharding.auto", "True beside explicit degrees", "one of the two", fix)
    for field in ("parameter_rules", "activation_rules"):
        for logical, axis in getattr(sharding, field):
            if axis is not None and axis not in AXES:
                found = f"mesh axis {axis!r} for {logical!r}"
                yield ConfigProblem(f"sharding.{field}", found, f"one of {', '.join(AXES)}, or None")


def degrees_problems(where: str, degrees: Mapping[str, int], devices: str) -> Problems:
    """Yield the problems of mesh degrees by axis; a degree of -1 is inferred from the number of `devices`."""
    for axis, degree in degrees.items():
        if degree < 1 and degree != -1:
            yield ConfigProblem(f"{where}.{axis}", str(degree), f"1 or more, or -1 for the remaining {devices}")
    inferred = [axis for axis, degree in degrees.items() if degree == -1]
    if len(inferred) > 1:
        yield ConfigProblem(where, f"-1 for {' and '.join(inferred)}", "at most one degree of -1")


def inconsistent_checkpoints(checkpoints: CheckpointConfig) -> Problems:
    """Yield a problem if checkpoints that are to be kept are never saved."""
    every, kept = checkpoints.save_every_steps, checkpoints.keep_period
    if kept is not None and every > 0 and kept % every:
        yield ConfigProblem(
            "checkpoints.keep_period",
            f"{kept} with saves every {every} steps",
            f"a multiple of save_every_steps, {every}: other steps are never saved",
        )


def inconsistent_scores(run: RunConfig) -> Problems:
    """Yield the problems of the scores by which checkpoints are kept and a run is stopped.

    Metrics that the model itself or a Task reports are known at the first evaluation only.
    """
    every, saves = run.evaluation.every_steps, run.checkpoints.save_every_steps
    rules = {
        "checkpoints.keep_best": run.checkpoints.keep_best,
        "evaluation.early_stopping": run.evaluation.early_stopping,
    }
    for where, rule in rules.items():
        if rule is None:
            continue
        if every is None:
            yield ConfigProblem(where, "without evaluation.every_steps", "evaluations during training")
        elif where == "checkpoints.keep_best" and every > 0 and saves > 0 and every % saves:
            expected = f"a multiple of checkpoints.save_every_steps, {saves}, so that what is evaluated is saved"
            yield ConfigProblem("evaluation.every_steps", f"{every} with {where}", expected)
        known = [*_score_names(run)]
        is_of_task = bool(run.evaluation.tasks) and "/" in rule.metric
        if not is_of_task and not any(fnmatch.fnmatchcase(rule.metric, name) for name in known):
            names = ", ".join(name.replace("*", "METRIC") for name in known)
            yield ConfigProblem(f"{where}.metric", repr(rule.metric), f"a score of the evaluations: {names}")


def _score_names(run: RunConfig) -> Iterator[str]:
    """Yield the names of the scores as patterns: an objective has loss, accuracy and metrics of its model."""
    if run.data.seqio is not None:
        yield f"*/{run.data.seqio.mixture_or_task}"
    for share in run.data.sources:
        for objective in run.data.objectives_of(share):
            yield f"*/{share.name}/{objective.name}" if len(run.data.sources) > 1 else f"*/{objective.name}"
    if run.data.sources and run.data.labelled is None and run.data.preference is None:
        yield "bits_per_byte_bound" if has_bound(run.data) else "bits_per_byte"
        if run.evaluation.continuation is not None:
            yield "continuation_bits_per_byte"


def inconsistent_evaluation(evaluation: EvaluationConfig) -> Problems:
    """Yield a problem for each name that several evaluation tasks have."""
    names = [task.mixture_or_task for task in evaluation.tasks]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield ConfigProblem(
            "evaluation.tasks", f"{name!r} {names.count(name)} times", "each name once: it is the key of the results"
        )


def inconsistent_monitoring(monitoring: MonitoringConfig) -> Problems:
    """Yield a problem if the profile has no steps."""
    steps = monitoring.profile_steps
    if steps is not None and steps[0] >= steps[1]:
        yield ConfigProblem("monitoring.profile_steps", repr(steps), "a first step below the step after the last")
