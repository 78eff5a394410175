"""What training rows are made of, counted on a sample of them, beside what the configuration says."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like.config.objectives import Objective
from t5x_like.data import keys as rng
from t5x_like.data.chi_square import Fit
from t5x_like.data.denoise import restore
from t5x_like.data.features import Features
from t5x_like.data.laws import Observed, fits, observe
from t5x_like.data.rows import Example, examples
from t5x_like.data.shares import Share, mixture_shares
from t5x_like.data.store_statistics import Lengths, lengths
from t5x_like.data.stream import Stream
from t5x_like.data.vocabulary import EOS_ID, Vocabulary

NGRAM = 8
_BATCHES_COMPARED = 16
_SAMPLES = 2

Progress = Callable[[int], None]


@dataclasses.dataclass
class Fill:
    """Cells of one stack in the sampled rows of a sub-batch."""

    sub_batch: str
    stack: str
    rows: int = 0
    examples: int = 0
    cells: int = 0
    filled: int = 0

    @property
    def share(self) -> float:
        return self.filled / self.cells if self.cells else 0.0


@dataclasses.dataclass
class Tally:
    """The sampled examples of one corpus under one objective.

    Attributes:
      rows: Rows; a row of several examples is divided among them.
      raw: Raw tokens of their windows; of pairs, inputs and targets.
      loss: Scored tokens, sentinels and EOS included.
      scored_text: Scored tokens of the text itself.
    """

    corpus: int
    objective: int
    rows: float = 0.0
    examples: int = 0
    raw: int = 0
    loss: int = 0
    scored_text: int = 0


@dataclasses.dataclass
class ObjectiveSample:
    """The sampled examples of one objective.

    Attributes:
      broken: Examples whose inputs and targets do not belong together.
    """

    input_lengths: list[int] = dataclasses.field(default_factory=list)
    target_lengths: list[int] = dataclasses.field(default_factory=list)
    observed: list[Observed] = dataclasses.field(default_factory=list)
    broken: int = 0


@dataclasses.dataclass(frozen=True)
class Part:
    """A corpus and objective: its expected share of the mixture beside the measured one.

    Attributes:
      expected, measured: Shares by example, by raw token and by loss token.
      scored: Of a raw token of its windows, how often the loss is on it.
      exposure: Of a raw token of the whole corpus, how often the loss is on it under this objective in one epoch.
    """

    corpus: str
    objective: Objective
    sub_batch: str
    examples: int
    expected: tuple[float, float, float]
    measured: tuple[float, float, float]
    scored: float
    exposure: float


@dataclasses.dataclass(frozen=True)
class ObjectiveStatistics:
    """An objective's lengths and laws."""

    objective: Objective
    examples: int
    inputs: Lengths
    targets: Lengths
    spans: Lengths | None
    fits: tuple[Fit, ...]
    broken: int


@dataclasses.dataclass(frozen=True)
class Statistics:
    """A sample of rows in numbers.

    Attributes:
      repeated_ngrams: For each of the batches that were looked at, the share of 8-grams of raw text that occur in
        another row of the same batch.
      coverage: By corpus: share of its tokens that an epoch's rows hold.
      samples: By objective: the first examples.
    """

    first_row: int
    rows: int
    fill: tuple[Fill, ...]
    parts: tuple[Part, ...]
    objectives: tuple[ObjectiveStatistics, ...]
    repeated_ngrams: tuple[float, ...]
    coverage: Mapping[str, float]
    samples: tuple[tuple[Objective, tuple[Example, ...]], ...]

    @property
    def fill_share(self) -> float:
        """Cells that are not padding, over all stacks and sub-batches."""
        cells = sum(fill.cells for fill in self.fill)
        return sum(fill.filled for fill in self.fill) / cells if cells else 0.0


def statistics(stream: Stream, rows: int, first_row: int = 0, progress: Progress | None = None) -> Statistics:
    """Reads whole batches of the stream until they have `rows` rows, and counts.

    One batch is in memory at a time; of each example, its lengths are kept.

    Args:
      stream: Of training rows.
      rows: At least one.
      first_row: Rows of the run before the sample.
      progress: Called with the number of rows read so far.
    """
    sample = Sample(stream.data.objectives, stream.vocabulary)
    read = 0
    while read < rows:
        sample.add(dict(_batch(stream, first_row + read)))
        read += stream.batch_size
        if progress:
            progress(min(read, rows))
    return sample.result(stream, first_row, read)


def _batch(stream: Stream, first_row: int) -> Iterator[tuple[str, tuple[Features, npt.NDArray[np.int64]]]]:
    """(sub-batch, (features, corpus of each row))."""
    for name, features in stream.batch_at(first_row).items():
        first = stream.first_of(name, first_row)
        numbers = np.arange(first, first + len(features["denoiser_ids"]), dtype=np.int64)
        yield name, (features, stream.corpora(numbers, name))


class Sample:
    """Counts over rows, batch by batch."""

    def __init__(self, objectives: Sequence[Objective], vocabulary: Vocabulary):
        self._objectives = objectives
        self._vocabulary = vocabulary
        self._fill: dict[tuple[str, str], Fill] = {}
        self._tallies: dict[tuple[int, int], Tally] = {}
        self._by_objective = [ObjectiveSample() for _ in objectives]
        self._repeated: list[float] = []
        self._batches = 0
        self._samples: list[list[Example]] = [[] for _ in objectives]

    def add(self, batch: Mapping[str, tuple[Features, npt.NDArray[np.int64]]]) -> None:
        """Counts one batch: by sub-batch its features, and the index of each row's corpus."""
        windows: list[tuple[int, npt.NDArray[Any]]] = []
        number = 0
        for name, (features, corpus_N) in batch.items():
            found = 0
            for row, corpus in enumerate(corpus_N.tolist()):
                in_row = list(examples({key: values[row] for key, values in features.items()}, self._objectives))
                found += len(in_row)
                number += 1
                for index, example in enumerate(in_row):
                    raw = self._count(example, corpus, 1 / len(in_row), first=index % 2 == 0)
                    if raw is not None:
                        windows.append((number, raw))
            self._count_cells(name, features, found)
        if self._batches < _BATCHES_COMPARED:
            self._repeated.append(repeated_ngrams(windows))
        self._batches += 1

    def _count_cells(self, sub_batch: str, features: Features, found: int) -> None:
        for stack in ("encoder", "decoder"):
            # A decoder reads its targets one position later: what it reads in the first place is 0, and no padding.
            tokens = features.get(f"{stack}_target_tokens", features.get(f"{stack}_input_tokens"))
            if tokens is None:
                continue
            fill = self._fill.setdefault((sub_batch, stack), Fill(sub_batch, stack))
            fill.rows += len(tokens)
            fill.examples += found
            fill.cells += tokens.size
            fill.filled += int(np.count_nonzero(tokens))

    def _count(self, example: Example, corpus: int, share: float, *, first: bool) -> npt.NDArray[Any] | None:
        """Counts one example; returns its raw text, None if it has none."""
        vocabulary, objective = self._vocabulary, self._objectives[example.denoiser]
        own = self._by_objective[example.denoiser]
        if len(self._samples[example.denoiser]) < _SAMPLES:
            self._samples[example.denoiser].append(example)
        own.input_lengths.append(len(example.inputs))
        own.target_lengths.append(len(example.targets))
        tally = self._tallies.setdefault((corpus, example.denoiser), Tally(corpus, example.denoiser))
        tally.rows += share
        tally.examples += 1
        tally.loss += int(example.scored.sum())
        try:
            raw = restore(example.inputs, example.targets, objective, vocabulary)
            own.observed.append(observe(example, len(raw), objective, vocabulary, first=first))
        except ValueError:
            own.broken += 1
            return None
        tally.raw += len(raw)
        tally.scored_text += scored_text(example, vocabulary)
        return raw

    def result(self, stream: Stream, first_row: int, rows: int) -> Statistics:
        """The numbers, beside what the stream's configuration says."""
        objectives = [
            ObjectiveStatistics(
                objective,
                len(own.input_lengths),
                lengths(np.array(own.input_lengths, np.int64)),
                lengths(np.array(own.target_lengths, np.int64)),
                _span_lengths(own.observed),
                tuple(fits(objective, own.observed, self._vocabulary)),
                own.broken,
            )
            for objective, own in zip(self._objectives, self._by_objective, strict=True)
        ]
        shares = mixture_shares(stream)
        return Statistics(
            first_row=first_row,
            rows=rows,
            fill=tuple(self._fill.values()),
            parts=tuple(self._parts(stream, shares)),
            objectives=tuple(objectives),
            repeated_ngrams=tuple(self._repeated),
            coverage=_coverage(stream, shares),
            samples=tuple(
                (objective, tuple(own)) for objective, own in zip(self._objectives, self._samples, strict=True)
            ),
        )

    def _parts(self, stream: Stream, shares: Iterable[Share]) -> Iterator[Part]:
        names = [objective.name for objective in self._objectives]
        corpora = [source.name for source in stream.sources]
        columns = ("rows", "raw", "loss")
        totals = [sum(getattr(tally, name) for tally in self._tallies.values()) or 1 for name in columns]
        for share in shares:
            index, corpus = names.index(share.name), corpora.index(share.corpus)
            tally = self._tallies.get((corpus, index), Tally(corpus, index))
            scored = tally.scored_text / tally.raw if tally.raw else 0.0
            measured = [getattr(tally, name) / total for name, total in zip(columns, totals, strict=True)]
            yield Part(
                corpus=share.corpus,
                objective=self._objectives[index],
                sub_batch=share.sub_batch,
                examples=tally.examples,
                expected=(share.by_example, share.by_token, share.by_loss_token),
                measured=(measured[0], measured[1], measured[2]),
                scored=scored,
                exposure=scored * _covered(stream, shares_of(shares, share.corpus), share),
            )


def shares_of(shares: Iterable[Share], corpus: str) -> list[Share]:
    """The shares of one corpus."""
    return [share for share in shares if share.corpus == corpus]


def _covered(stream: Stream, own: Sequence[Share], share: Share) -> float:
    """Share of a corpus's tokens that an epoch holds under one of its objectives."""
    source = next(source for source in stream.sources if source.name == share.corpus)
    examples = sum(one.by_example for one in own)
    if not examples or not source.split.num_tokens:
        return 0.0
    rows = stream.rows_per_epoch[share.corpus] * share.by_example / examples
    return rows * share.tokens / source.split.num_tokens


def _coverage(stream: Stream, shares: Sequence[Share]) -> dict[str, float]:
    found: dict[str, float] = collections.defaultdict(float)
    for share in shares:
        found[share.corpus] += _covered(stream, shares_of(shares, share.corpus), share)
    return dict(found)


def _span_lengths(observed: Sequence[Observed]) -> Lengths | None:
    spans = [length for one in observed for length in one.spans]
    return lengths(np.array(spans, np.int64)) if spans else None


def scored_text(example: Example, vocabulary: Vocabulary) -> int:
    """Scored tokens that are text: no sentinel, no mode token, not the EOS that the objective adds."""
    on = example.scored & (example.targets < vocabulary.base_size)
    if example.aligned or not len(on):
        return int(on.sum())
    if example.targets[-1] == EOS_ID and on[-1]:
        on[-1] = False
    # Where sentinels are not scored, EOS ends each span that they begin.
    starts = np.flatnonzero(~example.scored & (example.targets >= vocabulary.base_size))
    ends = starts[starts > 0] - 1
    on[ends[example.targets[ends] == EOS_ID]] = False
    return int(on.sum())


def repeated_ngrams(windows: Sequence[tuple[int, npt.NDArray[Any]]], size: int = NGRAM) -> float:
    """Share of the n-grams of a batch that occur in another of its rows.

    Args:
      windows: (row, raw tokens); n-grams do not reach over the end of one.
      size: Tokens of an n-gram.
    """
    hashes, rows = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for row, tokens in windows:
        count = len(tokens) - size + 1
        if count > 0:
            hashed = np.zeros(count, np.uint64)
            for place in range(size):
                hashed = rng.fold_in(hashed, tokens[place : place + count])
            hashes.append(hashed)
            rows.append(np.full(count, row))
    hash_M, row_M = np.concatenate(hashes), np.concatenate(rows)
    if not len(hash_M):
        return 0.0
    _, ngram_M = np.unique(hash_M, return_inverse=True)
    seen = np.unique(np.stack([ngram_M, row_M]), axis=1)
    rows_of = np.bincount(seen[0])
    return float((rows_of[ngram_M] > 1).mean())
