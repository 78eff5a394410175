"""Validation of a run's configuration, before any device or file is used. All problems are reported at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import assert_never

from t5x_like.config.batch_spec import row_shapes
from t5x_like.config.bounds import Problems, at_least, bound_problems, without_repetition
from t5x_like.config.continuation import continuation_problems
from t5x_like.config.data import DataConfig
from t5x_like.config.layouts import architecture_of, has_bidirectional_prefix, row_positions
from t5x_like.config.model import ModelConfig
from t5x_like.config.objectives import MODES, Layout, Objective
from t5x_like.config.run import RunConfig
from t5x_like.config.tokenizer import TokenizerConfig
from t5x_like.config.training import DistillationConfig
from t5x_like.config.validation.mixture import (
    corpora_problems,
    rate_problems,
    schedule_problems,
    seqio_problems,
    sub_batch_problems,
)
from t5x_like.config.validation.model import degenerate_buckets, inconsistent_model
from t5x_like.config.validation.sections import (
    inconsistent_checkpoints,
    inconsistent_evaluation,
    inconsistent_initialization,
    inconsistent_monitoring,
    inconsistent_scores,
    inconsistent_training,
    sharding_problems,
    tokenizer_problems,
)
from t5x_like.errors import ConfigProblem
from t5x_like.utils.trusted_urls import location_problems

_BYTE_VOCABULARY = 3 + 256
"""Number of ids of kind bytes: pad, eos, unk and one for each byte."""


def validate(run: RunConfig) -> list[ConfigProblem]:
    """Return all problems of a configuration that follow from it alone.

    The devices (the mesh, the rows per device) and files (the corpus, an existing vocabulary) are checked later, when
    they are known.
    """
    bounds = [*bound_problems(run)]
    return without_repetition(bounds, _inconsistencies(run, {problem.where for problem in bounds}))


def _inconsistencies(run: RunConfig, out_of_bounds: Collection[str]) -> Problems:
    """Yield the problems that concern several fields.

    Args:
      run: The configuration.
      out_of_bounds: Paths of the fields that are out of their bounds.
    """
    yield from inconsistent_model(run.model)
    data_problems = [*_data(run.data, out_of_bounds)]
    yield from data_problems
    if not data_problems and not any(path.startswith("data.") for path in out_of_bounds):
        yield from sub_batch_problems(run.data, run.training.global_batch_size)
        for index, stage in enumerate(run.training.batch_size_ramp):
            where = f"training.batch_size_ramp.{index}.batch_size"
            yield from sub_batch_problems(run.data, stage.batch_size, where)
        yield from _padding(run.model, run.data)
    yield from _model_and_data(run.model, run.data)
    yield from inconsistent_training(run.training)
    if run.training.layer_decay < 1 and any(
        s.experts and s.experts.layer_period > 1 for s in run.model.stacks.values()
    ):
        expected = "1.0 with experts in some layers only, whose rows are not numbered by layer"
        yield ConfigProblem("training.layer_decay", str(run.training.layer_decay), expected)
    if run.data.preference is not None and run.training.label_smoothing:
        expected = (
            "0 with preference pairs, whose loss has a label smoothing of its own: data.mixture.0.label_smoothing"
        )
        yield ConfigProblem("training.label_smoothing", str(run.training.label_smoothing), expected)
    if run.training.guard.policy == "rollback" and run.data.seqio is not None:
        expected = "'skip' or 'abort' with data.seqio, whose rows have no positions that could be passed over"
        yield ConfigProblem("training.guard.policy", "'rollback'", expected)
    if run.training.batch_size_ramp and run.data.seqio is not None:
        expected = "() with data.seqio, whose pipeline has batches of one size"
        yield ConfigProblem("training.batch_size_ramp", f"{len(run.training.batch_size_ramp)} stages", expected)
    if run.training.lora is not None:
        yield from location_problems(run.training.lora.base, "training.lora.base")
    if run.training.distillation is not None:
        yield from _distillation(run, run.training.distillation)
    if run.initialize_from is not None:
        yield from inconsistent_initialization(run.initialize_from)
        if run.training.lora is not None:
            expected = "one of the two: adapters take all other parameters from training.lora.base"
            fix = "--initialize-from None removes it"
            yield ConfigProblem("initialize_from", "beside training.lora", expected, fix)
    yield from sharding_problems(run.sharding)
    yield from inconsistent_checkpoints(run.checkpoints)
    yield from inconsistent_evaluation(run.evaluation)
    if not any(path.startswith(("data.", "evaluation.")) for path in out_of_bounds):
        yield from continuation_problems(run)
    yield from inconsistent_scores(run)
    yield from inconsistent_monitoring(run.monitoring)


def _distillation(run: RunConfig, distillation: DistillationConfig) -> Problems:
    """Yield the problems of a teacher, whose logits stand beside those of the model."""
    where, own, teacher = "training.distillation", run.model, distillation.model
    yield from location_problems(distillation.teacher, f"{where}.teacher")
    if own.task_head is not None or own.generator is not None or run.data.preference is not None:
        found = "a teacher beside a task head, a generator or preference pairs"
        yield ConfigProblem(where, found, "a loss of the logits of the next or the masked token")
    if distillation.top_k is not None:
        yield from _stored_teacher(run, distillation.top_k, f"{where}.top_k")
    if teacher is None:
        yield ConfigProblem(
            f"{where}.model", "none", "the model of the teacher, which `train` reads from its directory"
        )
        return
    for field in ("architecture", "vocab_size", "pad_token_id", "decoder_start_token_id"):
        found, expected = getattr(teacher, field), getattr(own, field)
        if found != expected:
            yield ConfigProblem(f"{where}.model.{field}", repr(found), f"{expected!r}, that of the model")
    if teacher.task_head is not None or teacher.generator is not None:
        yield ConfigProblem(f"{where}.model", "a task head or a generator", "a language model")


def _stored_teacher(run: RunConfig, top_k: int, where: str) -> Problems:
    """Yield the problems of a teacher whose distributions are stored by the index of the row."""
    if top_k > run.model.vocab_size:
        yield ConfigProblem(where, str(top_k), f"at most {run.model.vocab_size}, the vocabulary size")
    if run.data.seqio is not None:
        yield ConfigProblem(where, f"{top_k} with data.seqio, whose rows have no index", "None, or prepared data")
    if run.training.guard.policy == "rollback":
        expected = "'skip' or 'abort' with a stored teacher, which ends at the last row of the run"
        yield ConfigProblem("training.guard.policy", "'rollback'", expected)


def _data(data: DataConfig, out_of_bounds: Collection[str]) -> Problems:
    yield from location_problems(data.store_dir, "data.store_dir")
    if data.seqio is not None:
        yield from seqio_problems(data)
        yield from _lengths(data)
        return
    yield from corpora_problems(data)
    yield from tokenizer_problems(data.tokenizer, [share.corpus for share in data.sources])
    lengths = [*_lengths(data)]
    yield from lengths
    if not data.mixture:
        yield ConfigProblem("data.mixture", "no objectives", "at least one")
    problems = []
    for where, index, objective, names in _named_objectives(data):
        if not objective.name or names.index(objective.name) < index:
            expected = "a unique name: each objective has its own loss curve"
            problems.append(ConfigProblem(f"{where}.name", repr(objective.name), expected))
        problems += rate_problems(f"{where}.rate", objective.rate, data)
        own = [*objective.problems(where), *_objective_in_layout(where, objective, data.layout)]
        problems += own
        sound = not own and not lengths and not any(path.startswith(f"{where}.") for path in out_of_bounds)
        if sound:
            # The arithmetic of windows is defined for valid lengths and densities only.
            match objective.example_source:
                case "dialogues":
                    pass
                case "pairs" | "preferences":
                    problems += _pair(objective, data)
                case "text" | "labelled":
                    problems += _window(where, objective, data)
                case source:
                    assert_never(source)
    yield from problems
    if len(data.objectives) > 1 and (blocks := [one.name for one in data.objectives if one.reads_masked_targets]):
        found = f"{', '.join(blocks)} beside {len(data.objectives) - 1} other objectives"
        expected = "the only objective of the run: its decoder reads masked tokens at their own positions"
        yield ConfigProblem("data.mixture", found, expected)
    if data.mixture and not problems and not lengths:
        yield from schedule_problems(data)


def _named_objectives(data: DataConfig) -> Iterator[tuple[str, int, Objective, list[str]]]:
    """Yield (path, index, objective, names in its mixture) for every objective, those of single corpora included."""
    mixtures = {"data.mixture": data.mixture}
    mixtures |= {f"data.corpora.{index}.mixture": share.mixture for index, share in enumerate(data.corpora)}
    for where, mixture in mixtures.items():
        for index, objective in enumerate(mixture):
            yield f"{where}.{index}", index, objective, [other.name for other in mixture]


def _objective_in_layout(where: str, objective: Objective, layout: Layout) -> Problems:
    found = f"{objective.kind} in layout {layout}"
    masked = objective.predicts_in_place
    if objective.example_source == "labelled":
        return
    if layout == "encoder" and not masked:
        yield ConfigProblem(
            f"{where}.kind",
            found,
            "masked_lm or masked_diffusion, which predict each token at its own position",
            "or a layout with a decoder",
        )
    elif objective.reads_masked_targets:
        if layout != "encoder_decoder":
            yield ConfigProblem(
                f"{where}.kind", found, "an encoder for the text before the block", "or masked_diffusion"
            )
    elif masked and layout not in ("encoder", "prefix_lm"):
        yield ConfigProblem(f"{where}.kind", found, "bidirectional attention", "choose layout encoder or prefix_lm")
    elif layout == "encoder_decoder" and not objective.has_inputs:
        yield ConfigProblem(
            f"{where}.kind", found, "an objective with inputs for the encoder", "or layout causal_lm or prefix_lm"
        )


def _lengths(data: DataConfig) -> Problems:
    """Yield the problems of the row lengths for the layout. `_window` checks if a window of an objective fits."""
    if data.layout == "encoder":
        yield from at_least("data.inputs_length", data.inputs_length, 1)
        if data.targets_length:
            yield ConfigProblem(
                "data.targets_length",
                str(data.targets_length),
                "0: an encoder predicts tokens at the positions of its inputs",
            )
        return
    if data.labelled is not None:
        if data.targets_length:
            yield ConfigProblem(
                "data.targets_length", str(data.targets_length), "0: the targets of a task head are not in the row"
            )
        yield from at_least("data.inputs_length", data.inputs_length, 3)
        return
    two_parts = data.layout == "encoder_decoder" or any(
        objective.has_inputs and not objective.predicts_in_place for objective in data.objectives
    )
    yield from at_least("data.inputs_length", data.inputs_length, 1 if two_parts else 0)
    yield from at_least("data.targets_length", data.targets_length, 1 if two_parts else 0)


def _pair(objective: Objective, data: DataConfig) -> Problems:
    """Yield a problem if inputs or targets of a pair would be cut to nothing, in any layout."""
    least = {"inputs_length": 3 if objective.mode else 2, "targets_length": 2}
    for name, length in least.items():
        if getattr(data, name) < length:
            expected = f"{length} or more: a token of {objective.name!r}, EOS" + " and the mode token" * (length == 3)
            yield ConfigProblem(f"data.{name}", str(getattr(data, name)), expected)


def _window(where: str, objective: Objective, data: DataConfig) -> Problems:
    """Yield a problem if no window fits a row, or if a window can need more sentinels than the tokenizer has."""
    window = objective.raw_window_length(data.layout, data.inputs_length, data.targets_length)
    if window < 2:
        yield ConfigProblem(
            where,
            f"too short for {objective.name!r}: "
            f"inputs_length {data.inputs_length}, targets_length {data.targets_length}",
            "rows of at least two tokens with EOS, mode token and sentinels",
            "raise data.inputs_length or data.targets_length",
        )
        return
    needed = objective.sentinels_needed(window)
    # The last sentinels of the vocabulary can be markers of one kind of objective, which all others leave free.
    marking = max(data.objectives, key=lambda other: other.reserved_sentinels)
    and_markers = ""
    if needed and marking.reserved_sentinels and marking.kind != objective.kind:
        needed += marking.reserved_sentinels
        and_markers = f", including the markers of {marking.kind},"
    # A published tokenizer can have a mask token or sentinels of its own; the store's vocabulary is checked later.
    if needed > data.tokenizer.num_sentinels and data.tokenizer.kind != "published":
        yield ConfigProblem(
            where,
            f"{objective.name!r}, which can need {needed} sentinels{and_markers} in a window of {window} tokens",
            f"no more than data.tokenizer.num_sentinels, {data.tokenizer.num_sentinels}",
            f"raise data.tokenizer.num_sentinels to {needed}, or mask fewer or longer spans",
        )


def _model_and_data(model: ModelConfig, data: DataConfig) -> Problems:
    expected = architecture_of(data.layout)
    if model.stacks and model.architecture != expected:
        stacks = {
            "encoder_decoder": "an encoder and a decoder",
            "decoder": "a decoder only",
            "encoder": "an encoder only",
        }
        yield ConfigProblem(
            "data.layout", f"{data.layout!r} with {stacks[model.architecture]}", f"a model with {stacks[expected]}"
        )
    yield from _head_and_data(model, data)
    decoder = model.decoder
    if decoder and data.has_bidirectional_decoder and decoder.positions == "relative_bias":
        if not decoder.relative_bias_bidirectional:
            part = "prefix" if has_bidirectional_prefix(data.layout) else "block"
            yield degenerate_buckets("model.decoder", f"a token of the {part} attends to")
    for name, needed in row_positions(data.layout, data.inputs_length, data.targets_length).items():
        stack = model.stacks.get(name)
        if stack and stack.positions == "learned" and stack.max_positions < needed:
            yield ConfigProblem(
                f"model.{name}.max_positions", f"{stack.max_positions} for rows of {needed} tokens", f"{needed} or more"
            )
    ids = None if data.seqio is not None else required_vocabulary(data.tokenizer)
    if ids is not None and 1 <= model.vocab_size < ids:
        yield ConfigProblem(
            "model.vocab_size",
            str(model.vocab_size),
            f"{ids} or more: the tokenizer's ids with {data.tokenizer.num_sentinels} sentinels and the mode tokens",
        )


def _padding(model: ModelConfig, data: DataConfig) -> Problems:
    """Yield a problem if the model cannot tell the padding of rows from their text.

    A causal decoder need not: no scored position attends to the padding after it.
    """
    reads_padding = model.encoder is not None or model.task_head is not None
    if model.pad_token_id is None and reads_padding and not all(shape.packed for shape in row_shapes(data).values()):
        yield ConfigProblem(
            "model.pad_token_id",
            "None, with rows that are padded and have no segment ids",
            "the tokenizer's padding id",
        )


def _head_and_data(model: ModelConfig, data: DataConfig) -> Problems:
    """Yield a problem if there is a task head without labelled examples, the reverse, or a mismatch of the two."""
    head, labelled = model.task_head, data.labelled
    if head is None and labelled is not None:
        yield ConfigProblem("model.task_head", "none, with labelled examples", f"a head of kind {labelled.kind}")
    elif head is not None and labelled is None:
        found = ", ".join(objective.kind for objective in data.objectives) or "none"
        yield ConfigProblem(
            "data.mixture", f"{found}, with model.task_head", "one objective for labelled examples, of the head's kind"
        )
    elif head is not None and labelled is not None:
        if head.kind != labelled.kind:
            yield ConfigProblem(
                "model.task_head.kind", head.kind, f"{labelled.kind}, the kind of the labelled examples"
            )
        elif data.sources and head.labels != data.sources[0].corpus.labels:
            known = data.sources[0].corpus.labels
            found, expected = f"{len(head.labels)} labels", f"the {len(known)} labels of the corpus, in the same order"
            yield ConfigProblem("model.task_head.labels", found, expected)


def required_vocabulary(tokenizer: TokenizerConfig) -> int | None:
    """Return the number of ids with sentinels and mode tokens; None if only a model file or a seqio Task has it."""
    match tokenizer.kind:
        case "task" | "published":
            return None
        case "sentencepiece" | "bpe" | "wordpiece" | "unigram":
            if not tokenizer.is_trained:
                return None
            pieces = tokenizer.vocab_size
        case "bytes":
            pieces = _BYTE_VOCABULARY
        case unknown:
            assert_never(unknown)
    return pieces + tokenizer.num_sentinels + len(MODES)
