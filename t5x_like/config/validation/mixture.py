"""Problems of a mixture: its corpora, its sub-batches, and changes of rates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

from t5x_like.config.batch_spec import row_shapes, sub_batch_rows_per_block
from t5x_like.config.bounds import Problems, above
from t5x_like.config.corpus import CorpusConfig, TargetKind
from t5x_like.config.data import CorpusMixingConfig, CorpusShareConfig, DataConfig
from t5x_like.config.mixture_schedule import phases
from t5x_like.config.model import HeadKind
from t5x_like.config.validation.sections import corpus_problems
from t5x_like.errors import ConfigProblem


def corpora_problems(data: DataConfig) -> Problems:
    """Yield the problems of the corpora and of their shares."""
    if not data.corpora:
        yield from corpus_problems(data.corpus)
    elif data.corpus != CorpusConfig():
        yield ConfigProblem(
            "data.corpora", "a mixture beside data.corpus", "one of the two", "add data.corpus to data.corpora"
        )
    names = [share.name for share in data.corpora]
    for index, share in enumerate(data.corpora):
        where = f"data.corpora.{index}"
        if not share.name or names.index(share.name) < index:
            yield ConfigProblem(f"{where}.name", repr(share.name), "a unique name: epochs are counted by name")
        yield from rate_problems(f"{where}.rate", share.rate, data)
        yield from corpus_problems(share.corpus, f"{where}.corpus")
    if data.mask_document_borders:
        yield from _borders(data)
    for index, share in enumerate(data.sources):
        yield from _objectives_of(f"data.corpora.{index}" if data.corpora else "data", share, data)
    yield from _sampling(data.corpus_mixing)
    known = {objective.name: objective for objective in data.mixture}
    for index, share in enumerate(data.corpora):
        for objective in share.mixture:
            if known.setdefault(objective.name, objective) != objective:
                yield ConfigProblem(
                    f"data.corpora.{index}.mixture",
                    f"an objective {objective.name!r} that differs from another one of this name",
                    "one definition for each name: loss curves are named by it",
                )


def _borders(data: DataConfig) -> Problems:
    """Yield the problems of masked document borders, which are found in the targets."""
    where = "data.mask_document_borders"
    if data.layout not in ("causal_lm", "encoder"):
        yield ConfigProblem(where, f"True with the layout {data.layout}", "causal_lm or encoder")
    for objective in data.objectives:
        if not objective.targets_are_text:
            expected = "causal LM or masked LM, whose targets are the text"
            yield ConfigProblem(where, f"True with {objective.name!r}", expected, "or example_mode documents")
    if any(data.examples_of(share) != "windows" for share in data.sources):
        yield ConfigProblem(where, "True with example_mode documents", "windows: documents are separate already")


def _objectives_of(where: str, share: CorpusShareConfig, data: DataConfig) -> Problems:
    """Yield the problems of the objectives of a corpus: pairs need a supervised objective, all others need text."""
    objectives = data.objectives_of(share)
    if any(objective.example_source == "labelled" for objective in objectives):
        yield from _labelled(where, share, data)
        return
    if data.preference is not None:
        yield from _preferences(where, share, data)
        return
    if share.corpus.negative_fields:
        kinds = ", ".join(objective.kind for objective in objectives) or "none"
        yield ConfigProblem(f"{where}.mixture", f"{kinds} for hard negatives", "one objective, of kind embedding")
        return
    if share.corpus.rejected_field is not None:
        kinds = ", ".join(objective.kind for objective in objectives) or "none"
        yield ConfigProblem(f"{where}.mixture", f"{kinds} for preference pairs", "one objective, of kind preference")
        return
    documents = data.examples_of(share) == "documents"
    if share.corpus.messages_field is not None:
        yield from _dialogues(where, share, data)
        return
    if share.corpus.inputs_field is not None:
        if [objective.example_source for objective in objectives] != ["pairs"]:
            kinds = ", ".join(objective.kind for objective in objectives) or "none"
            yield ConfigProblem(
                f"{where}.mixture", f"{kinds} for supervised pairs", "one objective, of kind supervised"
            )
        if not documents:
            yield ConfigProblem(
                f"{where}.example_mode", "windows of supervised pairs", "documents: a pair is an example"
            )
        if data.layout == "encoder":
            yield ConfigProblem("data.layout", "encoder with supervised pairs", "a layout that predicts the targets")
        return
    if documents and data.rate_unit != "example" and len(objectives) > 1:
        found = f"{data.rate_unit!r} with example_mode documents, where each document is assigned to an objective"
        yield ConfigProblem("data.rate_unit", found, "'example', or example_mode windows")
    scheduled = {name for change in data.rate_schedule for name, _ in change.objectives}
    for objective in objectives:
        if objective.example_source == "dialogues":
            yield ConfigProblem(
                f"{where}.mixture", f"{objective.name!r} for plain text", "dialogues", "name their messages_field"
            )
        if objective.example_source == "pairs":
            yield ConfigProblem(
                f"{where}.mixture", f"{objective.name!r} for plain text", "a corpus of pairs", "name its inputs_field"
            )
        if documents and objective.name in scheduled and len(objectives) > 1:
            found = f"changes of the rate of {objective.name!r} with example_mode documents"
            yield ConfigProblem(
                "data.rate_schedule", found, "rates of corpora, or example_mode windows: packing is planned once"
            )
        if documents and objective.windows_per_row > 1:
            yield ConfigProblem(
                f"{where}.mixture",
                f"{objective.name!r} with complementary pairs, for documents",
                "example_mode windows, or no pairs",
            )


def _dialogues(where: str, share: CorpusShareConfig, data: DataConfig) -> Problems:
    """Yield the problems of dialogues: the objective and the layout that `messages_as` needs."""
    as_turns = share.corpus.messages_as == "turns"
    wanted = "pairs" if as_turns else "dialogues"
    kinds = [objective.kind for objective in data.objectives_of(share)]
    if [objective.example_source for objective in data.objectives_of(share)] != [wanted]:
        expected = f"one objective, of kind {'supervised' if as_turns else 'dialogues'}"
        found = f"{', '.join(kinds) or 'none'} for messages as {share.corpus.messages_as}"
        yield ConfigProblem(f"{where}.mixture", found, expected)
    if data.examples_of(share) != "documents":
        expected = "documents: a dialogue is an example"
        yield ConfigProblem(f"{where}.example_mode", "windows of dialogues", expected)
    if not as_turns and len(data.row_positions) == 2:
        fix = "with messages_as turns, the encoder reads the dialogue before each answer"
        yield ConfigProblem("data.layout", f"{data.layout} with dialogues", "causal_lm or prefix_lm", fix)


_TARGETS_OF: dict[HeadKind, TargetKind] = {
    "classification": "label",
    "token_classification": "token_labels",
    "regression": "number",
    "embedding": "text",
}


def _labelled(where: str, share: CorpusShareConfig, data: DataConfig) -> Problems:
    """Yield the problems of a task head's data: one objective, and pairs whose targets have the type of its outputs."""
    if len(data.objectives) > 1 or data.labelled is None:
        names = ", ".join(objective.name for objective in data.objectives)
        yield ConfigProblem(
            f"{where}.mixture", f"the objectives {names}", "the labelled objective alone: a model has one head"
        )
        return
    if data.layout == "encoder_decoder":
        yield ConfigProblem(
            "data.layout", "encoder_decoder with labelled examples", "encoder, or prefix_lm or causal_lm"
        )
    corpus, kind = share.corpus, data.labelled.kind
    if corpus.inputs_field is None:
        yield ConfigProblem(
            f"{where}.corpus.inputs_field", "none", "the field of the text; text_field is the field of the label"
        )
    if corpus.target_kind != _TARGETS_OF[kind]:
        yield ConfigProblem(f"{where}.corpus.target_kind", corpus.target_kind, f"{_TARGETS_OF[kind]}, for {kind}")
    if corpus.labels != data.sources[0].corpus.labels:
        yield ConfigProblem(
            f"{where}.corpus.labels",
            "labels that differ from those of the first corpus",
            "the same labels in all corpora",
        )
    if corpus.negative_fields and kind != "embedding":
        yield ConfigProblem(f"{where}.corpus.negative_fields", f"hard negatives for {kind}", "none, or kind embedding")
    if corpus.max_negatives != data.sources[0].corpus.max_negatives:
        found = f"{corpus.max_negatives} hard negatives in a row, {data.sources[0].corpus.max_negatives} in the first"
        fix = "set num_negatives of all corpora to the largest number"
        yield ConfigProblem(f"{where}.corpus.num_negatives", found, "the same number in all corpora", fix)
    if "documents" in (data.example_mode, share.example_mode):
        expected = "windows, the default: each labelled example is a row, and rows are not packed"
        yield ConfigProblem(f"{where}.example_mode", "documents for labelled examples", expected)


def _preferences(where: str, share: CorpusShareConfig, data: DataConfig) -> Problems:
    """Yield the problems of preference pairs: one objective for all corpora, which have two answers to each prompt."""
    if len(data.objectives) > 1:
        names = ", ".join(objective.name for objective in data.objectives)
        expected = "the preference objective alone: its loss is a mean over pairs, that of others over tokens"
        yield ConfigProblem(f"{where}.mixture", f"the objectives {names}", expected)
    if share.corpus.rejected_field is None:
        fix = "text_field is the field of the chosen one, inputs_field that of the prompt"
        yield ConfigProblem(f"{where}.corpus.rejected_field", "none", "the field of the rejected answer", fix)
    objective, corpus = data.preference, share.corpus
    in_stream = corpus.messages_field is not None and corpus.messages_as == "dialogue"
    if objective is not None and objective.dialogues != in_stream:
        found = f"{objective.dialogues} with " + (
            "no messages_field" if corpus.messages_field is None else f"messages as {corpus.messages_as}"
        )
        expected = "True if, and only if, the corpus has messages as dialogue"
        yield ConfigProblem(f"{where}.mixture.0.dialogues", found, expected)
    if in_stream and len(data.row_positions) == 2:
        fix = "with messages_as turns, the encoder reads the dialogue before the answers"
        yield ConfigProblem("data.layout", f"{data.layout} with dialogues", "causal_lm or prefix_lm", fix)
    if "documents" in (data.example_mode, share.example_mode):
        expected = "windows, the default; pairs_per_row of the objective packs preference pairs"
        yield ConfigProblem(f"{where}.example_mode", "documents for preference pairs", expected)


def _sampling(sampling: CorpusMixingConfig) -> Problems:
    where = "data.corpus_mixing"
    if sampling.strategy == "unimax" and sampling.budget_tokens is None:
        yield ConfigProblem(
            f"{where}.budget_tokens", "none", "the number of raw tokens of the run, which unimax distributes"
        )


def rate_problems(where: str, rate: float, data: DataConfig) -> Problems:
    """Yield a problem if a rate is 0 and no schedule can raise it."""
    if not data.rate_schedule:
        yield from above(where, rate, 0)


def schedule_problems(data: DataConfig) -> Problems:
    """Yield the problems of the changes of rates, for valid objectives."""
    steps = [phase.start_step for phase in data.rate_schedule]
    objectives = [objective.name for objective in data.objectives]
    corpora = [share.name for share in data.sources]
    before = 0
    for index, change in enumerate(data.rate_schedule):
        where = f"data.rate_schedule.{index}"
        if steps[index] <= before:
            yield ConfigProblem(
                f"{where}.start_step", str(steps[index]), f"a step after {before}, the previous change of rates"
            )
        before = max(before, steps[index])
        if change.temperature is not None and data.corpus_mixing.strategy != "proportional":
            found = f"a temperature for the strategy {data.corpus_mixing.strategy}"
            yield ConfigProblem(f"{where}.temperature", found, "data.corpus_mixing.strategy proportional")
        for field, known in (("objectives", objectives), ("corpora", corpora)):
            for name, _ in getattr(change, field):
                if name not in known:
                    yield ConfigProblem(f"{where}.{field}", repr(name), f"one of {', '.join(known)}")
    for index, phase in enumerate(phases(data)):
        where = f"data.rate_schedule.{index - 1}" if index else "data"
        if not any(phase.corpora.values()):
            yield ConfigProblem(f"{where}.corpora", "a rate of 0 for all", "at least one rate above 0")
        for share in data.sources:
            if not any(phase.objectives[objective.name] for objective in data.objectives_of(share)):
                field = "objectives" if index else "mixture"
                yield ConfigProblem(f"{where}.{field}", "a rate of 0 for all", "at least one rate above 0")


def sub_batch_problems(data: DataConfig, batch_size: int, of_size: str = "training.global_batch_size") -> Problems:
    """Yield the problems of sub-batches, for valid lengths, objectives and schedule.

    `of_size` is the field with the batch size.
    """
    where = "data.targets_length_buckets"
    for length in data.targets_length_buckets:
        if data.layout != "encoder_decoder":
            yield ConfigProblem(where, f"{length} in layout {data.layout}", "none: decoder-only rows need no buckets")
        elif not 1 <= length < data.targets_length:
            yield ConfigProblem(where, str(length), f"a length below data.targets_length, {data.targets_length}")
        elif f"targets_{length}" not in row_shapes(data):
            yield ConfigProblem(where, str(length), "a length that the targets of at least one objective fit")
    shapes = row_shapes(data)
    if len(shapes) == 1:
        return
    if any(share.mixture for share in data.corpora):
        yield ConfigProblem(
            where,
            "corpora with their own objectives",
            "one mixture for all corpora, so that all steps have the same sub-batches",
        )
        return
    rows_by_phase = sub_batch_rows_per_block(data)
    shares = [{name: Fraction(count, sum(phase.values())) for name, count in phase.items()} for phase in rows_by_phase]
    if any(share != shares[0] for share in shares):
        yield ConfigProblem(
            "data.rate_schedule",
            "rates that change the shares of the sub-batches",
            "rates that keep the rows of each sub-batch",
        )
    least = math.lcm(*(share.denominator for share in shares[0].values()))
    if batch_size > 0 and batch_size % least:
        rows = ", ".join(f"{count} {name}" for name, count in _reduced(shares[0], least))
        yield ConfigProblem(
            of_size,
            str(batch_size),
            f"a multiple of {least} rows: {rows}",
            f"for example {max(round(batch_size / least), 1) * least}",
        )


def _reduced(shares: dict[str, Fraction], rows: int) -> Iterator[tuple[str, int]]:
    for name, share in shares.items():
        yield name, int(share * rows)


def seqio_problems(data: DataConfig) -> Problems:
    """Yield the problems of data that seqio reads live."""
    assert data.seqio is not None
    if data.layout == "encoder" and data.seqio.mask_id is None:
        expected = "the id of the Task's mask token: the loss is computed at the positions where the inputs have it"
        yield ConfigProblem("data.seqio.mask_id", "None with the layout encoder", expected)
    if data.mixture:
        expected = "(): the Task produces inputs and targets"
        yield ConfigProblem("data.mixture", f"{len(data.mixture)} objectives beside data.seqio", expected)
    for name in ("corpora", "rate_schedule", "targets_length_buckets"):
        if getattr(data, name):
            yield ConfigProblem(f"data.{name}", "a value beside data.seqio", "(): the field is for prepared stores")
