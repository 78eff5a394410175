"""What can be wrong within one section of a configuration: numbers out of range, fields that contradict each other."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from t5x_like.config.adaptation import SAME, InitializeFrom
from t5x_like.config.corpora import CorpusConfig, TokenizerConfig
from t5x_like.config.errors import Problem
from t5x_like.config.model import ModelConfig, RopeScaling, StackConfig
from t5x_like.config.objectives import (
    Bart,
    BlankInfilling,
    CausalMasking,
    FillInTheMiddle,
    MaskedLM,
    Objective,
    PrefixLM,
    SpanCorruption,
)
from t5x_like.config.partitioning import AXES, DcnConfig, PartitioningConfig
from t5x_like.config.run import CheckpointConfig, EvaluationConfig, MonitoringConfig
from t5x_like.config.training import Adafactor, AdamW, Freeze, Schedule, TrainingConfig

Problems = Iterator[Problem]

TEXT_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
SMALLEST_SENTENCEPIECE = 260
"""pad, eos, unk, a piece for each byte and one for the newline: what `prepare` needs before the first character."""


def above(where: str, value: float | None, bound: float) -> Problems:
    if value is not None and not (math.isfinite(value) and value > bound):
        yield Problem(where, f"{value:g}", f"a number above {bound:g}")


def at_least(where: str, value: int | None, bound: int, fix: str = "") -> Problems:
    if value is not None and value < bound:
        yield Problem(where, str(value), f"{bound} or more", fix)


def within(where: str, value: float | None, low: float, high: float, *, ends: str = "[]") -> Problems:
    """Problems unless `value` lies in the interval; `ends` says which of its ends belong to it."""
    if value is None:
        return
    above = value >= low if ends[0] == "[" else value > low
    below = value <= high if ends[1] == "]" else value < high
    if not (above and below):
        yield Problem(where, f"{value:g}", f"a number in {ends[0]}{low:g}, {high:g}{ends[1]}")


def model_problems(model: ModelConfig) -> Problems:
    if not model.stacks:
        yield Problem("model", "neither an encoder nor a decoder", "at least one stack")
    for name, stack in model.stacks.items():
        yield from _stack(f"model.{name}", stack)
        yield from _attention_dropout(f"model.{name}", stack, model)
    if model.attention == "cudnn" and model.dtype == "float32":
        yield Problem(
            "model.dtype", "float32 with model.attention cudnn", "bfloat16: cuDNN's kernels are half precision"
        )
    encoder, decoder = model.encoder, model.decoder
    if encoder and decoder and encoder.d_model != decoder.d_model:
        yield from _unequal_widths(model, encoder, decoder)
    if encoder and encoder.positions == "relative_bias" and not encoder.relative_bias_bidirectional:
        yield degenerate_buckets("model.encoder", "an encoder sees")
    yield from at_least("model.vocab_size", model.vocab_size, 1)
    yield from above("model.embedding_stddev", model.embedding_stddev, 0)
    yield from _embedding_width(model)
    yield from _generator(model)
    yield from _task_head(model)
    if model.unscaled_token is not None:
        yield from within("model.unscaled_token", model.unscaled_token, 0, model.vocab_size - 1)
    yield from above("model.logits_softcap", model.logits_softcap, 0)
    if model.separate_encoder_embeddings and not (encoder and decoder):
        yield Problem("model.separate_encoder_embeddings", "True", "False: there is one stack and one table")
    if model.separate_encoder_embeddings and model.embedding_width:
        yield Problem("model.embedding_width", str(model.embedding_width), "None: each table is as wide as its stack")


def _unequal_widths(model: ModelConfig, encoder: StackConfig, decoder: StackConfig) -> Problems:
    where = "model.decoder.d_model"
    found = f"{decoder.d_model} beside model.encoder.d_model {encoder.d_model}"
    if not model.separate_encoder_embeddings:
        yield Problem(
            where, found, "equal widths: the stacks share the token table", "or model.separate_encoder_embeddings True"
        )
    if decoder.cross_attention == "merged":
        yield Problem(where, found, "equal widths: merged attention has the same projections for both stacks' states")


def _embedding_width(model: ModelConfig) -> Problems:
    yield from at_least("model.embedding_width", model.embedding_width, 1)
    if not model.stacks or not model.tie_embeddings or model.head_transform or model.task_head:
        return
    read = model.generator or next(reversed(model.stacks.values()))
    if read.d_model != model.table_width:
        where = "model.generator" if model.generator else next(reversed(model.stacks))
        yield Problem(
            "model.head_transform",
            f"False, with a tied table of {model.table_width} columns for states of width {read.d_model}",
            "True: the transform brings the states to the table's width",
            f"or make {where.removeprefix('model.')} as wide as the table, or do not tie",
        )


def _generator(model: ModelConfig) -> Problems:
    """ELECTRA's generator beside its discriminator, which is the model's encoder."""
    generator, where = model.generator, "model.generator"
    if generator is None:
        return
    if model.decoder or not model.encoder:
        yield Problem(where, "a generator in a model with a decoder", "an encoder alone, which tells what was replaced")
        return
    yield from _stack(where, generator)
    yield from _attention_dropout(where, generator, model)
    yield from above("model.discriminator_loss_weight", model.discriminator_loss_weight, 0)
    for name, stack in (("encoder", model.encoder), ("generator", generator)):
        if stack.experts:
            yield Problem(f"model.{name}.experts", f"{stack.experts.num_experts}", "no experts beside a generator")
    learned = "learned" in (generator.positions, model.encoder.positions)
    for name in ("positions", "max_positions") if learned else ():
        if getattr(generator, name) != getattr(model.encoder, name):
            found = f"{getattr(generator, name)} beside {getattr(model.encoder, name)} of model.encoder"
            yield Problem(
                f"{where}.{name}", found, "the same: the embeddings are shared, and learned positions with them"
            )
    if generator.positions == "relative_bias" and not generator.relative_bias_bidirectional:
        yield degenerate_buckets(where, "a generator sees")


def _task_head(model: ModelConfig) -> Problems:
    """A head for texts in the place of the one over the vocabulary."""
    head, where = model.task_head, "model.task_head"
    if head is None:
        return
    if model.encoder and model.decoder:
        yield Problem(
            where, "a head beside an encoder and a decoder", "one stack: take the encoder out, or the decoder"
        )
    if model.generator:
        yield Problem(where, "a head beside a generator", "one of them")
    classes = head.kind in ("classification", "token_classification")
    if classes and len(head.labels) < 2:
        yield Problem(f"{where}.labels", f"{len(head.labels)} labels", "two or more")
    elif not classes and head.labels:
        yield Problem(f"{where}.labels", f"labels for {head.kind}", "none: they are for classification")
    if len(set(head.labels)) < len(head.labels):
        yield Problem(f"{where}.labels", "a label twice", "each label once")
    yield from within(f"{where}.dropout_rate", head.dropout_rate, 0, 1, ends="[)")
    yield from above(f"{where}.temperature", head.temperature, 0)


def _stack(where: str, stack: StackConfig) -> Problems:
    for name in ("num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "max_positions"):
        yield from at_least(f"{where}.{name}", getattr(stack, name), 1)
    if stack.num_kv_heads > 0 and stack.num_heads % stack.num_kv_heads:
        yield Problem(
            f"{where}.num_kv_heads",
            f"{stack.num_kv_heads} for {stack.num_heads} heads",
            "a divisor of num_heads, so that each key and value head serves as many queries",
        )
    if stack.positions == "rope":
        if stack.head_dim % 2:
            yield Problem(f"{where}.head_dim", str(stack.head_dim), "an even number: rope turns pairs of dimensions")
        yield from above(f"{where}.rope_base", stack.rope_base, 1)
        yield from above(f"{where}.local_rope_base", stack.local_rope_base, 1)
    if stack.rope_scaling:
        yield from _rope_scaling(f"{where}.rope_scaling", stack.rope_scaling)
    yield from _windows(where, stack)
    if stack.experts:
        yield from at_least(f"{where}.experts.num_experts", stack.experts.num_experts, 1)
        chosen = f"{where}.experts.experts_per_token"
        yield from within(chosen, stack.experts.experts_per_token, 1, max(stack.experts.num_experts, 1))
        yield from above(f"{where}.experts.capacity_factor", stack.experts.capacity_factor, 0)
        yield from within(f"{where}.experts.load_balancing", stack.experts.load_balancing, 0, 1)
        if stack.use_bias or stack.dropout_rate > 0 or not stack.mlp_gated:
            yield Problem(f"{where}.experts", "biases, dropout or no gate", "gated experts without biases and dropout")
    if stack.cross_attention == "merged" and stack.positions in ("relative_bias", "disentangled"):
        found = f"merged with positions {stack.positions}"
        yield Problem(f"{where}.cross_attention", found, "rope: the encoder's keys have no place among the buckets")
    yield from at_least(f"{where}.token_types", stack.token_types, 0)
    yield from above(f"{where}.attention_softcap", stack.attention_softcap, 0)
    if not stack.first_layer_attention_norm and stack.norm_placement != "pre":
        yield Problem(f"{where}.first_layer_attention_norm", "False", "True: only a pre-norm stack can leave it out")
    if stack.positions == "relative_bias":
        yield from _relative_bias(where, stack)
    if stack.positions == "disentangled":
        yield from at_least(f"{where}.relative_bias_buckets", stack.relative_bias_buckets, 4)
        farthest = stack.relative_bias_buckets // 2 + 2
        yield from at_least(f"{where}.relative_bias_max_distance", stack.relative_bias_max_distance, farthest)
    yield from above(f"{where}.norm_epsilon", stack.norm_epsilon, 0)
    yield from above(f"{where}.attention_scale", stack.attention_scale, 0)
    yield from within(f"{where}.dropout_rate", stack.dropout_rate, 0, 1, ends="[)")


def _rope_scaling(where: str, scaling: RopeScaling) -> Problems:
    yield from above(f"{where}.factor", scaling.factor, 0)
    yield from above(f"{where}.low_frequency_factor", scaling.low_frequency_factor, 0)
    yield from above(f"{where}.high_frequency_factor", scaling.high_frequency_factor, scaling.low_frequency_factor)
    yield from at_least(f"{where}.original_max_positions", scaling.original_max_positions, 1)


def _windows(where: str, stack: StackConfig) -> Problems:
    if not stack.layer_pattern:
        yield Problem(f"{where}.layer_pattern", "nothing", "one kind of layer or more")
    if "local" in stack.layer_pattern and stack.window is None:
        yield Problem(f"{where}.window", "None with local layers", "how many cells they see to the left and the right")
    for cells in stack.window or ():
        yield from at_least(f"{where}.window", cells, 0)


def _attention_dropout(where: str, stack: StackConfig, model: ModelConfig) -> Problems:
    """The fused backends can drop keys for all queries alike, and then only where each head has its own keys."""
    shared = stack.dropout_broadcast_length and stack.num_heads == stack.num_kv_heads
    if model.attention != "reference" and stack.dropout_rate > 0 and not shared:
        yield Problem(
            f"{where}.dropout_rate",
            f"{stack.dropout_rate:g} with model.attention {model.attention}",
            "no dropout, or dropout_broadcast_length True with as many key heads as query heads",
            "or model.attention reference",
        )
    unsupported = stack.attention_softcap is not None or stack.positions == "disentangled"
    if model.attention != "reference" and unsupported:
        yield Problem(
            "model.attention",
            f"{model.attention} with attention_softcap or disentangled positions",
            "reference: the fused backends have neither",
        )


def _relative_bias(where: str, stack: StackConfig) -> Problems:
    """T5's buckets: half of them for each direction, of these half for exact distances and the rest by logarithm."""
    directions = 2 if stack.relative_bias_bidirectional else 1
    buckets = stack.relative_bias_buckets
    if buckets < 2 * directions or buckets % directions:
        expected = "an even number of 4 or more for two directions" if directions == 2 else "2 or more"
        yield Problem(f"{where}.relative_bias_buckets", str(buckets), expected)
        return
    exact = buckets // directions // 2
    if stack.relative_bias_max_distance <= exact:
        yield Problem(
            f"{where}.relative_bias_max_distance",
            str(stack.relative_bias_max_distance),
            f"more than {exact}, the distances that have a bucket of their own among {buckets}",
        )


def degenerate_buckets(where: str, who: str) -> Problem:
    return Problem(
        f"{where}.relative_bias_bidirectional",
        "False",
        f"True: {who} keys to the right, which would all share the bucket of distance 0",
    )


def corpus_problems(corpus: CorpusConfig, where: str = "data.corpus") -> Problems:
    sources = {"files": corpus.files, "tfds": corpus.tfds, "task": corpus.task}
    given = [name for name, value in sources.items() if value]
    if len(given) > 1:
        yield Problem(where, " and ".join(given), "one source of documents", "leave the others out")
    if corpus.module and not corpus.task:
        yield Problem(f"{where}.module", f"{corpus.module!r} without a task", "the task that this module registers")
    for pattern in corpus.files:
        # What a wildcard stands for is known only when the files are listed.
        suffix = pattern[pattern.rfind("*") + 1 :]
        concrete = "*" not in pattern or "." in suffix
        if not pattern or (concrete and not pattern.endswith(TEXT_SUFFIXES)):
            yield Problem(
                f"{where}.files",
                repr(pattern),
                f"paths or globs of files in {', '.join(TEXT_SUFFIXES)}",
                f"of a folder, name its files: '{pattern.rstrip('/')}/*.txt'" if "." not in pattern else "",
            )
    if not corpus.text_field:
        yield Problem(f"{where}.text_field", "nothing", "the name of a field")
    if corpus.inputs_field is not None:
        yield from _pairs_problems(corpus, where)
    classes = corpus.target_kind in ("label", "token_labels")
    if corpus.target_kind != "text" and corpus.inputs_field is None:
        yield Problem(f"{where}.inputs_field", f"none, with targets of kind {corpus.target_kind}", "the text's field")
    if classes != bool(corpus.labels):
        found = "no labels" if classes else f"{len(corpus.labels)} labels for targets of kind {corpus.target_kind}"
        yield Problem(f"{where}.labels", found, "labels where target_kind is label or token_labels, and only there")
    for label in corpus.labels:
        if not label.strip() or (corpus.target_kind == "token_labels" and len(label.split()) > 1):
            yield Problem(f"{where}.labels", repr(label), "a name; of token_labels, without a space in it")
    if len(set(corpus.labels)) < len(corpus.labels):
        yield Problem(f"{where}.labels", "a label twice", "each label once")
    yield from within(f"{where}.validation_fraction", corpus.validation_fraction, 0, 1, ends="()")
    yield from at_least(f"{where}.max_documents", corpus.max_documents, 2, "one for training, one held out")


def _pairs_problems(corpus: CorpusConfig, where: str) -> Problems:
    """Pairs come from sources that have fields."""
    field = f"{where}.inputs_field"
    if not corpus.inputs_field:
        yield Problem(field, "nothing", "the name of a field, or None for plain text")
    if not (corpus.files or corpus.tfds or corpus.task):
        yield Problem(field, f"{corpus.inputs_field!r} of the embedded corpus", "files, tfds or task, which have pairs")
    for pattern in corpus.files:
        if pattern.endswith(".txt"):
            yield Problem(field, f"{corpus.inputs_field!r} of {pattern!r}", "files with fields: .jsonl or .parquet")
    targets = "targets" if corpus.task else corpus.text_field
    if corpus.inputs_field == targets:
        yield Problem(field, f"{targets!r}, which holds the targets", "another field than the targets'")


def tokenizer_problems(tokenizer: TokenizerConfig, corpora: Sequence[CorpusConfig]) -> Problems:
    where = "data.tokenizer"
    if tokenizer.kind == "task" and not any(corpus.task for corpus in corpora):
        yield Problem(
            f"{where}.kind", "'task' without a seqio Task", "a corpus that names one", "or kind sentencepiece"
        )
    if tokenizer.kind == "task" and tokenizer.path:
        yield Problem(f"{where}.path", repr(tokenizer.path), "none: the Task has its own", "or kind sentencepiece")
    if tokenizer.kind == "bytes" and tokenizer.path:
        yield Problem(f"{where}.path", repr(tokenizer.path), "none: bytes have no model file", "or kind sentencepiece")
    yield from at_least(f"{where}.vocab_size", tokenizer.vocab_size, SMALLEST_SENTENCEPIECE)
    yield from at_least(f"{where}.num_sentinels", tokenizer.num_sentinels, 0)


def objective_problems(where: str, objective: Objective) -> Problems:
    if isinstance(objective, SpanCorruption):
        yield from within(f"{where}.noise_density", objective.noise_density, 0, 1, ends="()")
        span_length = objective.mean_noise_span_length
        if not (math.isfinite(span_length) and span_length >= 1):
            yield Problem(f"{where}.mean_noise_span_length", f"{span_length:g}", "1 or more tokens")
    if isinstance(objective, PrefixLM):
        yield from within(f"{where}.min_target_fraction", objective.min_target_fraction, 0, 1)
        low = max(objective.min_target_fraction, 0)
        yield from within(f"{where}.max_target_fraction", objective.max_target_fraction, low, 1)
    if isinstance(objective, FillInTheMiddle | CausalMasking | Bart | BlankInfilling):
        yield from _infilling_problems(where, objective)
    if isinstance(objective, MaskedLM):
        yield from within(f"{where}.mask_rate", objective.mask_rate, 0, 1, ends="(]")
        yield from within(f"{where}.replace_with_mask", objective.replace_with_mask, 0, 1)
        left = 1 - min(max(objective.replace_with_mask, 0), 1)
        if objective.replace_with_random < 0 or objective.replace_with_random > left + 1e-9:
            yield Problem(
                f"{where}.replace_with_random",
                f"{objective.replace_with_random:g}",
                f"a number in [0, {left:g}], what replace_with_mask {objective.replace_with_mask:g} leaves",
            )
        yield from within(f"{where}.span_end_probability", objective.span_end_probability, 0, 1, ends="(]")
        yield from within(f"{where}.max_span_words", objective.max_span_words, 1, 1000)


def _infilling_problems(where: str, objective: FillInTheMiddle | CausalMasking | Bart | BlankInfilling) -> Problems:
    if isinstance(objective, FillInTheMiddle):
        yield from within(f"{where}.fim_rate", objective.fim_rate, 0, 1)
        yield from within(f"{where}.spm_rate", objective.spm_rate, 0, 1)
    elif isinstance(objective, CausalMasking):
        yield from within(f"{where}.mean_spans", objective.mean_spans, 0, 100, ends="(]")
        yield from within(f"{where}.max_spans", objective.max_spans, 1, 100)
    elif isinstance(objective, Bart):
        yield from within(f"{where}.infill_rate", objective.infill_rate, 0, 1, ends="[)")
        yield from within(f"{where}.mean_span_length", objective.mean_span_length, 1, 1000)
        left = max(1 - objective.infill_rate, 0)
        yield from within(f"{where}.delete_rate", objective.delete_rate, 0, left)
        yield from within(f"{where}.mask_rate", objective.mask_rate, 0, max(left - objective.delete_rate, 0) + 1e-9)
    else:
        yield from within(f"{where}.mask_rate", objective.mask_rate, 0, 0.5, ends="(]")
        yield from within(f"{where}.mean_span_length", objective.mean_span_length, 0, 1000, ends="(]")


def training_problems(training: TrainingConfig) -> Problems:
    where = "training"
    yield from within(f"{where}.num_train_steps", training.num_train_steps, 1, 2**31 - 1)
    yield from at_least(f"{where}.batch_size", training.batch_size, 1)
    parts = training.gradient_accumulation_steps
    yield from at_least(f"{where}.gradient_accumulation_steps", parts, 1)
    if parts > 0 and training.batch_size % parts:
        yield Problem(
            f"{where}.batch_size",
            f"{training.batch_size} rows in {parts} parts",
            f"a multiple of gradient_accumulation_steps, {parts}",
        )
    yield from _optimizer(f"{where}.optimizer", training.optimizer)
    yield from _schedule(f"{where}.schedule", training.schedule)
    yield from above(f"{where}.max_gradient_norm", training.max_gradient_norm, 0)
    yield from within(f"{where}.z_loss", training.z_loss, 0, 1)
    yield from within(f"{where}.label_smoothing", training.label_smoothing, 0, 1, ends="[)")
    yield from _freeze(f"{where}.freeze", training.freeze)
    if training.lora is not None:
        yield from at_least(f"{where}.lora.rank", training.lora.rank, 1)
        yield from above(f"{where}.lora.alpha", training.lora.alpha, 0)
        if not training.lora.paths:
            yield Problem(f"{where}.lora.paths", "none", "at least one regular expression for paths of kernels")
        if not training.lora.base:
            yield Problem(f"{where}.lora.base", "nothing", "the directory of a run or of an imported model")
    yield from within(f"{where}.seed", training.seed, 0, 2**32 - 1)


def _freeze(where: str, freeze: Sequence[Freeze]) -> Problems:
    for place, entry in enumerate(freeze):
        if not entry.paths:
            yield Problem(f"{where}.{place}.paths", "nothing", "one regular expression or more")
        yield from patterns(f"{where}.{place}.paths", entry.paths)
        yield from at_least(f"{where}.{place}.until_step", entry.until_step, 1)


def patterns(where: str, found: Sequence[str]) -> Problems:
    for number, pattern in enumerate(found):
        try:
            re.compile(pattern)
        except re.error as error:
            yield Problem(f"{where}.{number}", repr(pattern), f"a regular expression ({error})")


def initialize_problems(source: InitializeFrom) -> Problems:
    where = "initialize_from"
    if not source.directory:
        yield Problem(f"{where}.directory", "nothing", "a run's directory, or one that `t5x-like convert` wrote")
    yield from at_least(f"{where}.step", source.step, 0)
    if not source.rules:
        yield Problem(f"{where}.rules", "nothing", "one rule or more")
    for number, (pattern, replacement) in enumerate(source.rules):
        try:
            # A template is read before a match is looked for.
            re.sub(pattern, replacement, "")
        except (re.error, IndexError) as error:
            found = f"{pattern!r} -> {replacement!r}"
            yield Problem(f"{where}.rules.{number}", found, f"a regular expression and a replacement ({error})")
    if source.optimizer and (source.rules != SAME or source.fresh or source.grow):
        yield Problem(f"{where}.optimizer", "True with rules", "False: the state is that of the same model only")
    yield from patterns(f"{where}.fresh", source.fresh)
    yield from patterns(f"{where}.grow", source.grow)


def _optimizer(where: str, optimizer: Adafactor | AdamW) -> Problems:
    yield from within(f"{where}.weight_decay", optimizer.weight_decay, 0, math.inf, ends="[)")
    if isinstance(optimizer, Adafactor):
        yield from above(f"{where}.decay_rate", optimizer.decay_rate, 0)
        yield from above(f"{where}.clipping_threshold", optimizer.clipping_threshold, 0)
        yield from above(f"{where}.epsilon1", optimizer.epsilon1, 0)
        yield from above(f"{where}.epsilon2", optimizer.epsilon2, 0)
        yield from at_least(f"{where}.min_dim_size_to_factor", optimizer.min_dim_size_to_factor, 1)
        yield from within(f"{where}.momentum", optimizer.momentum, 0, 1, ends="[)")
    else:
        yield from within(f"{where}.b1", optimizer.b1, 0, 1, ends="[)")
        yield from within(f"{where}.b2", optimizer.b2, 0, 1, ends="[)")
        yield from above(f"{where}.eps", optimizer.eps, 0)


def _schedule(where: str, schedule: Schedule) -> Problems:
    yield from above(f"{where}.learning_rate", schedule.learning_rate, 0)
    yield from at_least(f"{where}.warmup_steps", schedule.warmup_steps, 0)
    yield from at_least(f"{where}.decay_steps", schedule.decay_steps, 1)
    yield from within(f"{where}.cooldown_fraction", schedule.cooldown_fraction, 0, 1, ends="(]")
    yield from within(f"{where}.final_fraction", schedule.final_fraction, 0, 1)
    end = schedule.decay_steps
    if schedule.kind in ("cosine", "wsd") and end is not None and 0 < end < schedule.warmup_steps:
        yield Problem(f"{where}.warmup_steps", f"{schedule.warmup_steps}, beyond decay_steps {end}", f"{end} or fewer")


def partitioning_problems(partitioning: PartitioningConfig) -> Problems:
    for where, degrees, left in (
        ("partitioning", partitioning.degrees, "devices"),
        ("partitioning.dcn", partitioning.dcn.degrees, "slices"),
    ):
        yield from degrees_problems(where, degrees, left)
    named = dataclasses.replace(
        partitioning,
        **{axis: getattr(PartitioningConfig(), axis) for axis in AXES},
        dcn=DcnConfig(),
    )
    if partitioning.auto and named != partitioning:
        fix = "leave degrees out, or set partitioning.auto=False"
        yield Problem("partitioning.auto", "True beside degrees that are named", "one of the two", fix)
    for field in ("parameter_rules", "activation_rules"):
        for logical, axis in getattr(partitioning, field):
            if axis is not None and axis not in AXES:
                found = f"mesh axis {axis!r} for {logical!r}"
                yield Problem(f"partitioning.{field}", found, f"one of {', '.join(AXES)}, or none")


def degrees_problems(where: str, degrees: Mapping[str, int], left: str) -> Problems:
    """Of degrees that nothing is known of but themselves; `left` is what -1 takes."""
    for axis, degree in degrees.items():
        if degree < 1 and degree != -1:
            yield Problem(f"{where}.{axis}", str(degree), f"1 or more, or -1 for the {left} that are left")
    free = [axis for axis, degree in degrees.items() if degree == -1]
    if len(free) > 1:
        yield Problem(where, f"-1 for {' and '.join(free)}", "at most one degree of -1")


def checkpoints_problems(checkpoints: CheckpointConfig) -> Problems:
    every, kept = checkpoints.save_every_steps, checkpoints.keep_every_steps
    yield from at_least("checkpoints.save_every_steps", every, 1)
    yield from at_least("checkpoints.keep_last", checkpoints.keep_last, 1)
    yield from at_least("checkpoints.keep_every_steps", kept, 1)
    if kept is not None and every > 0 and kept % every:
        yield Problem(
            "checkpoints.keep_every_steps",
            f"{kept} with saves every {every} steps",
            f"a multiple of save_every_steps, {every}: other steps are never saved",
        )


def evaluation_problems(evaluation: EvaluationConfig) -> Problems:
    yield from at_least("evaluation.every_steps", evaluation.every_steps, 1)
    yield from at_least("evaluation.num_batches", evaluation.num_batches, 1)
    for number, task in enumerate(evaluation.tasks):
        where = f"evaluation.tasks.{number}"
        for field in ("num_examples", "inputs_length", "targets_length"):
            yield from at_least(f"{where}.{field}", getattr(task, field), 1)
    names = [task.mixture_or_task for task in evaluation.tasks]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Problem("evaluation.tasks", f"{name!r} {names.count(name)} times", "each name once: results go by it")


def monitoring_problems(monitoring: MonitoringConfig) -> Problems:
    yield from at_least("monitoring.log_every_steps", monitoring.log_every_steps, 1)
    yield from at_least("monitoring.samples", monitoring.samples, 0)
    yield from above("monitoring.hang_timeout_seconds", monitoring.hang_timeout_seconds, 0)
