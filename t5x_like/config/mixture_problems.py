"""What can be wrong with a mixture: its corpora, its sub-batches, and rates that change."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

from t5x_like.config.batch import row_shapes, sub_batch_slots
from t5x_like.config.corpora import CorpusConfig, TargetKind
from t5x_like.config.data import CorpusShare, DataConfig, SamplingConfig
from t5x_like.config.errors import Problem
from t5x_like.config.lengths import windows_per_row
from t5x_like.config.model import HeadKind
from t5x_like.config.objectives import Labelled, Supervised
from t5x_like.config.rates import phases
from t5x_like.config.sections import Problems, above, at_least, corpus_problems, within


def corpora_problems(data: DataConfig) -> Problems:
    """Of the corpora and the law by which they share the rows."""
    if not data.corpora:
        yield from corpus_problems(data.corpus)
    elif data.corpus != CorpusConfig():
        yield Problem("data.corpora", "a mixture beside data.corpus", "one of them", "make data.corpus a part of it")
    names = [share.name for share in data.corpora]
    for index, share in enumerate(data.corpora):
        where = f"data.corpora.{index}"
        if not share.name or names.index(share.name) < index:
            yield Problem(f"{where}.name", repr(share.name), "a name of its own: its epochs are counted by it")
        yield from rate_problems(f"{where}.rate", share.rate, data)
        yield from corpus_problems(share.corpus, f"{where}.corpus")
    for index, share in enumerate(data.sources):
        yield from _objectives_of(f"data.corpora.{index}" if data.corpora else "data", share, data)
    yield from _sampling(data.sampling)
    known = {objective.name: objective for objective in data.mixture}
    for index, share in enumerate(data.corpora):
        for objective in share.mixture:
            if known.setdefault(objective.name, objective) != objective:
                yield Problem(
                    f"data.corpora.{index}.mixture",
                    f"another {objective.name!r} than elsewhere",
                    "one meaning for a name: its loss curve goes by it",
                )


def _objectives_of(where: str, share: CorpusShare, data: DataConfig) -> Problems:
    """Pairs need a supervised objective and whole examples; other objectives need text."""
    objectives = data.objectives_of(share)
    if any(isinstance(objective, Labelled) for objective in objectives):
        yield from _labelled(where, share, data)
        return
    documents = data.examples_of(share) == "documents"
    if share.corpus.inputs_field is not None:
        if len(objectives) != 1 or not isinstance(objectives[0], Supervised):
            kinds = ", ".join(objective.kind for objective in objectives) or "none"
            yield Problem(f"{where}.mixture", f"{kinds} for supervised pairs", "one objective, of kind supervised")
        if not documents:
            yield Problem(f"{where}.examples", "windows of supervised pairs", "documents: a pair is an example")
        if data.layout == "encoder":
            yield Problem("data.layout", "encoder with supervised pairs", "a layout that predicts the targets")
        return
    if documents and data.rates_by != "example" and len(objectives) > 1:
        found = f"{data.rates_by!r} with examples documents, each of which is drawn for an objective"
        yield Problem("data.rates_by", found, "'example', or examples windows")
    scheduled = {name for change in data.schedule for name, _ in change.objectives}
    for objective in objectives:
        if isinstance(objective, Supervised):
            yield Problem(
                f"{where}.mixture", f"{objective.name!r} for plain text", "a corpus of pairs", "name its inputs_field"
            )
        if documents and objective.name in scheduled and len(objectives) > 1:
            found = f"other rates of {objective.name!r}, under which documents are packed"
            yield Problem("data.schedule", found, "rates of corpora, or examples windows: packing is planned once")
        if documents and windows_per_row(objective) > 1:
            yield Problem(
                f"{where}.mixture", f"{objective.name!r}, paired, for documents", "examples windows, or no pairs"
            )


_TARGETS_OF: dict[HeadKind, TargetKind] = {
    "classification": "label",
    "token_classification": "token_labels",
    "regression": "number",
    "embedding": "text",
}


def _labelled(where: str, share: CorpusShare, data: DataConfig) -> Problems:
    """A head has one objective, and pairs whose targets are what it says."""
    if len(data.objectives) > 1 or data.labelled is None:
        names = ", ".join(objective.name for objective in data.objectives)
        yield Problem(f"{where}.mixture", f"the objectives {names}", "the labelled one alone: a model has one head")
        return
    if data.layout == "encoder_decoder":
        yield Problem("data.layout", "encoder_decoder with labelled examples", "encoder, or prefix_lm or causal_lm")
    corpus, kind = share.corpus, data.labelled.kind
    if corpus.inputs_field is None:
        yield Problem(f"{where}.corpus.inputs_field", "none", "the field of the text; text_field holds the label")
    if corpus.target_kind != _TARGETS_OF[kind]:
        yield Problem(f"{where}.corpus.target_kind", corpus.target_kind, f"{_TARGETS_OF[kind]}, for {kind}")
    if corpus.labels != data.sources[0].corpus.labels:
        yield Problem(f"{where}.corpus.labels", "other labels than those of the first corpus", "the same in all")
    if "documents" in (data.examples, share.examples):
        expected = "windows, the default: labelled examples are one to a row, and are not packed"
        yield Problem(f"{where}.examples", "documents, packed, for labelled examples", expected)


def _sampling(sampling: SamplingConfig) -> Problems:
    where = "data.sampling"
    yield from above(f"{where}.temperature", sampling.temperature, 0)
    yield from at_least(f"{where}.maximum_tokens", sampling.maximum_tokens, 1)
    yield from above(f"{where}.max_epochs", sampling.max_epochs, 0)
    yield from at_least(f"{where}.budget_tokens", sampling.budget_tokens, 1)
    if sampling.law == "unimax" and sampling.budget_tokens is None:
        yield Problem(f"{where}.budget_tokens", "none", "the raw tokens of the run, which unimax shares out")


def rate_problems(where: str, rate: float, data: DataConfig) -> Problems:
    """Of a rate that a schedule can raise: only then may it begin with 0."""
    if rate != 0 or not data.schedule:
        yield from above(where, rate, 0)


def schedule_problems(data: DataConfig) -> Problems:
    """Of the changes of the rates, for objectives that are sound themselves."""
    steps = [phase.start_step for phase in data.schedule]
    objectives = [objective.name for objective in data.objectives]
    corpora = [share.name for share in data.sources]
    before = 0
    for index, change in enumerate(data.schedule):
        where = f"data.schedule.{index}"
        if steps[index] <= before:
            yield Problem(f"{where}.start_step", str(steps[index]), f"a step behind {before}, where the rates changed")
        before = max(before, steps[index])
        for field, known in (("objectives", objectives), ("corpora", corpora)):
            for name, rate in getattr(change, field):
                if name not in known:
                    yield Problem(f"{where}.{field}", repr(name), f"one of {', '.join(known)}")
                yield from within(f"{where}.{field}", rate, 0, math.inf, ends="[)")
    for index, phase in enumerate(phases(data)):
        where = f"data.schedule.{index - 1}" if index else "data"
        if not any(phase.corpora.values()):
            yield Problem(f"{where}.corpora", "a rate of 0 for all", "a rate above 0 for one at least")
        for share in data.sources:
            if not any(phase.objectives[objective.name] for objective in data.objectives_of(share)):
                field = "objectives" if index else "mixture"
                yield Problem(f"{where}.{field}", "a rate of 0 for all", "a rate above 0 for one at least")


def sub_batch_problems(data: DataConfig, batch_size: int) -> Problems:
    """Of the shapes of rows, for lengths, objectives and a schedule that are sound themselves."""
    where = "data.short_targets_lengths"
    for length in data.short_targets_lengths:
        if data.layout != "encoder_decoder":
            yield Problem(where, f"{length} in layout {data.layout}", "none: rows of one stream are full as they are")
        elif not 1 <= length < data.targets_length:
            yield Problem(where, str(length), f"a length below data.targets_length, {data.targets_length}")
        elif f"targets_{length}" not in row_shapes(data):
            yield Problem(where, str(length), "a length that the targets of an objective fit")
    shapes = row_shapes(data)
    if len(shapes) == 1:
        return
    if any(share.mixture for share in data.corpora):
        yield Problem(
            where, "corpora with objectives of their own", "one mixture for all, so that each step has as many"
        )
        return
    slots = sub_batch_slots(data)
    shares = [{name: Fraction(count, sum(phase.values())) for name, count in phase.items()} for phase in slots]
    if any(share != shares[0] for share in shares):
        yield Problem("data.schedule", "other shares of the sub-batches", "rates that leave each sub-batch its rows")
    least = math.lcm(*(share.denominator for share in shares[0].values()))
    if batch_size > 0 and batch_size % least:
        rows = ", ".join(f"{count} {name}" for name, count in _reduced(shares[0], least))
        yield Problem(
            "training.batch_size",
            str(batch_size),
            f"a multiple of {least}: of so many rows, {rows}",
            f"for example {max(round(batch_size / least), 1) * least}",
        )


def _reduced(shares: dict[str, Fraction], rows: int) -> Iterator[tuple[str, int]]:
    for name, share in shares.items():
        yield name, int(share * rows)


def seqio_problems(data: DataConfig) -> Problems:
    """What is wrong with the data of a run that is read live."""
    assert data.seqio is not None
    if not data.seqio.mixture_or_task:
        yield Problem("data.seqio.mixture_or_task", "nothing", "the name of a registered seqio Task or Mixture")
    if data.layout == "encoder" and data.seqio.mask_id is None:
        expected = "the id of the Task's mask token: seqio scores the positions where the inputs have it"
        yield Problem("data.seqio.mask_id", "None with the layout encoder", expected)
    if data.seqio.num_epochs is not None and data.seqio.num_epochs < 1:
        yield Problem("data.seqio.num_epochs", str(data.seqio.num_epochs), "at least 1, or None for no end")
    if data.mixture:
        expected = "(): the Task makes inputs and targets itself"
        yield Problem("data.mixture", f"{len(data.mixture)} objectives beside data.seqio", expected)
    for name in ("corpora", "schedule", "short_targets_lengths"):
        if getattr(data, name):
            yield Problem(f"data.{name}", "a value beside data.seqio", "(): it is for prepared stores")
