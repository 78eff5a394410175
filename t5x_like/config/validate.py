"""Everything that can be known to be wrong with a run before a device or a file is touched, all at once."""

from __future__ import annotations

import re
from collections.abc import Iterator

from t5x_like.config.corpora import TokenizerConfig
from t5x_like.config.data import DataConfig
from t5x_like.config.errors import Problem
from t5x_like.config.lengths import INFILLING_MARKERS, raw_window_length, sentinels_needed
from t5x_like.config.mixture_problems import (
    corpora_problems,
    rate_problems,
    schedule_problems,
    seqio_problems,
    sub_batch_problems,
)
from t5x_like.config.model import Architecture, ModelConfig
from t5x_like.config.objectives import (
    MODES,
    WITHOUT_INPUTS,
    FillInTheMiddle,
    Labelled,
    Layout,
    MaskedLM,
    Objective,
    PrefixLM,
    SpanCorruption,
    Supervised,
)
from t5x_like.config.run import RunConfig
from t5x_like.config.sections import (
    Problems,
    at_least,
    checkpoints_problems,
    degenerate_buckets,
    evaluation_problems,
    initialize_problems,
    model_problems,
    monitoring_problems,
    objective_problems,
    partitioning_problems,
    tokenizer_problems,
    training_problems,
    within,
)

ARCHITECTURE_OF_LAYOUT: dict[Layout, Architecture] = {
    "encoder_decoder": "encoder_decoder",
    "prefix_lm": "decoder",
    "causal_lm": "decoder",
    "encoder": "encoder",
}
_BYTE_VOCABULARY = 3 + 256
"""pad, eos and unk, then the bytes."""


def validate(run: RunConfig) -> list[Problem]:
    """All problems of a configuration that follow from it alone; none if it is sound.

    What depends on the devices (the mesh, the rows per device) is checked when they are known; what depends on files
    (the corpus, a given vocabulary) when they are read.
    """
    problems: list[Problem] = []
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", run.name):
        problems.append(Problem("name", repr(run.name), "letters, digits and -_., which name the run's directory"))
    problems += model_problems(run.model)
    problems += (of_data := list(_data(run.data)))
    if not of_data:
        problems += sub_batch_problems(run.data, run.training.batch_size)
    problems += _model_and_data(run.model, run.data)
    problems += training_problems(run.training)
    if run.initialize_from is not None:
        problems += initialize_problems(run.initialize_from)
        if run.training.lora is not None:
            expected = "one of the two: with adapters all other parameters are those of training.lora.base"
            problems.append(Problem("initialize_from", "beside training.lora", expected))
    problems += partitioning_problems(run.partitioning)
    problems += checkpoints_problems(run.checkpoints)
    problems += evaluation_problems(run.evaluation)
    problems += monitoring_problems(run.monitoring)
    return problems


def _data(data: DataConfig) -> Problems:
    if data.seqio is not None:
        yield from seqio_problems(data)
        yield from _lengths(data)
        yield from within("data.seed", data.seed, 0, 2**32 - 1)
        yield from at_least("data.prefetch", data.prefetch, 1)
        return
    yield from corpora_problems(data)
    yield from tokenizer_problems(data.tokenizer, [share.corpus for share in data.sources])
    lengths = [*_lengths(data)]
    yield from lengths
    if not data.mixture:
        yield Problem("data.mixture", "no objectives", "at least one")
    found = []
    for where, index, objective, names in _named_objectives(data):
        if not objective.name or names.index(objective.name) < index:
            found += [
                Problem(f"{where}.name", repr(objective.name), "a name of its own: each objective has its own curve")
            ]
        found += rate_problems(f"{where}.rate", objective.rate, data)
        own = [*objective_problems(where, objective), *_objective_in_layout(where, objective, data.layout)]
        found += own
        if not own and not lengths:
            # The arithmetic of windows makes sense only for lengths and densities that do.
            found += (
                _pair(where, objective, data) if isinstance(objective, Supervised) else _window(where, objective, data)
            )
    yield from found
    if data.mixture and not found and not lengths:
        yield from schedule_problems(data)
    yield from within("data.seed", data.seed, 0, 2**32 - 1)
    yield from at_least("data.prefetch", data.prefetch, 1)
    if not data.store:
        yield Problem("data.store", "nothing", "the path of a folder")


def _named_objectives(data: DataConfig) -> Iterator[tuple[str, int, Objective, list[str]]]:
    """(path, index, objective, names of its mixture) of all objectives, those of single corpora too."""
    mixtures = {"data.mixture": data.mixture}
    mixtures |= {f"data.corpora.{index}.mixture": share.mixture for index, share in enumerate(data.corpora)}
    for where, mixture in mixtures.items():
        for index, objective in enumerate(mixture):
            yield f"{where}.{index}", index, objective, [other.name for other in mixture]


def _objective_in_layout(where: str, objective: Objective, layout: Layout) -> Problems:
    found = f"{objective.kind} in layout {layout}"
    masked = isinstance(objective, MaskedLM)
    if isinstance(objective, Labelled):
        return
    if layout == "encoder" and not masked:
        yield Problem(f"{where}.kind", found, "masked_lm, which predicts in place", "or a layout with a decoder")
    elif masked and layout not in ("encoder", "prefix_lm"):
        yield Problem(f"{where}.kind", found, "attention in both directions", "layout encoder or prefix_lm")
    elif layout == "encoder_decoder" and isinstance(objective, WITHOUT_INPUTS):
        yield Problem(
            f"{where}.kind", found, "an objective with inputs for the encoder", "or layout causal_lm or prefix_lm"
        )


def _lengths(data: DataConfig) -> Problems:
    """Cells that the layout and the objectives need; whether a window fits into them is for `_window`."""
    if data.layout == "encoder":
        yield from at_least("data.inputs_length", data.inputs_length, 1)
        if data.targets_length:
            yield Problem(
                "data.targets_length", str(data.targets_length), "0: an encoder predicts where its inputs are"
            )
        return
    if data.labelled is not None:
        if data.targets_length:
            yield Problem("data.targets_length", str(data.targets_length), "0: a head has no targets in the row")
        yield from at_least("data.inputs_length", data.inputs_length, 3)
        return
    two_parts = data.layout == "encoder_decoder" or any(
        isinstance(objective, SpanCorruption | PrefixLM | Supervised) for objective in data.objectives
    )
    yield from at_least("data.inputs_length", data.inputs_length, 1 if two_parts else 0)
    yield from at_least("data.targets_length", data.targets_length, 1 if two_parts else 0)


def _pair(where: str, objective: Supervised, data: DataConfig) -> Problems:
    """Lengths to which a pair would be cut until nothing of one side is left; in one stream each has its own too."""
    least = {"inputs_length": 3 if objective.mode else 2, "targets_length": 2}
    for name, cells in least.items():
        if getattr(data, name) < cells:
            expected = f"{cells} or more: a token of {objective.name!r} with its end" + " and mode" * (cells == 3)
            yield Problem(f"data.{name}", str(getattr(data, name)), expected)


def _window(where: str, objective: Objective, data: DataConfig) -> Problems:
    """A window that does not fit its row, or that can need more sentinels than the tokenizer has."""
    window = raw_window_length(objective, data.layout, data.inputs_length, data.targets_length)
    if window < 2:
        yield Problem(
            where,
            f"no room for {objective.name!r}: inputs_length {data.inputs_length}, targets_length {data.targets_length}",
            "a row that holds at least two tokens with their end, mode and sentinels",
            "raise data.inputs_length or data.targets_length",
        )
        return
    needed = sentinels_needed(objective, data.layout, data.inputs_length, data.targets_length)
    markers = any(isinstance(other, FillInTheMiddle) and other.fim_rate > 0 for other in data.objectives)
    and_markers = ""
    if needed and markers and not isinstance(objective, FillInTheMiddle):
        needed, and_markers = needed + INFILLING_MARKERS, ", with those that mark the parts of fill_in_the_middle,"
    if needed > data.tokenizer.num_sentinels:
        yield Problem(
            where,
            f"{objective.name!r}, which can need {needed} sentinels{and_markers} in a window of {window} tokens",
            f"no more than data.tokenizer.num_sentinels, {data.tokenizer.num_sentinels}",
            f"raise data.tokenizer.num_sentinels to {needed}, or mask fewer or longer spans",
        )


def _model_and_data(model: ModelConfig, data: DataConfig) -> Problems:
    expected = ARCHITECTURE_OF_LAYOUT[data.layout]
    if model.stacks and model.architecture != expected:
        stacks = {
            "encoder_decoder": "an encoder and a decoder",
            "decoder": "a decoder only",
            "encoder": "an encoder only",
        }
        yield Problem(
            "data.layout", f"{data.layout!r} with {stacks[model.architecture]}", f"a model with {stacks[expected]}"
        )
    yield from _head_and_data(model, data)
    decoder = model.decoder
    if decoder and data.layout == "prefix_lm" and decoder.positions == "relative_bias":
        if not decoder.relative_bias_bidirectional:
            yield degenerate_buckets("model.decoder", "within its prefix a token sees")
    decoder_length = data.targets_length if data.layout == "encoder_decoder" else data.row_length
    rows = {"encoder": data.inputs_length, "decoder": decoder_length}
    for name, stack in model.stacks.items():
        if stack.positions == "learned" and stack.max_positions < rows[name]:
            yield Problem(
                f"model.{name}.max_positions",
                f"{stack.max_positions} for rows of {rows[name]} cells",
                f"{rows[name]} or more",
            )
    needed = None if data.seqio is not None else required_vocabulary(data.tokenizer)
    if needed is not None and 1 <= model.vocab_size < needed:
        yield Problem(
            "model.vocab_size",
            str(model.vocab_size),
            f"{needed} or more: the tokenizer's ids with its {data.tokenizer.num_sentinels} sentinels and the modes",
        )


def _head_and_data(model: ModelConfig, data: DataConfig) -> Problems:
    """A head and labelled examples belong together."""
    head, labelled = model.task_head, data.labelled
    if head is None and labelled is not None:
        yield Problem("model.task_head", "none, with labelled examples", f"a head of kind {labelled.kind}")
    elif head is not None and labelled is None:
        found = ", ".join(objective.kind for objective in data.objectives) or "none"
        yield Problem("data.mixture", f"{found}, with model.task_head", "one labelled objective, of the head's kind")
    elif head is not None and labelled is not None:
        if head.kind != labelled.kind:
            yield Problem("model.task_head.kind", head.kind, f"{labelled.kind}, the kind of the labelled examples")
        elif data.sources and head.labels != data.sources[0].corpus.labels:
            known = data.sources[0].corpus.labels
            found, expected = f"{len(head.labels)} labels", f"the {len(known)} of the corpus, in their order"
            yield Problem("model.task_head.labels", found, expected)


def required_vocabulary(tokenizer: TokenizerConfig) -> int | None:
    """Ids of a tokenizer with its sentinels and mode tokens; None where only a model file or a Task knows."""
    if tokenizer.path or tokenizer.kind == "task":
        return None
    pieces = tokenizer.vocab_size if tokenizer.kind == "sentencepiece" else _BYTE_VOCABULARY
    return pieces + tokenizer.num_sentinels + len(MODES)
