"""RowStatistics of training rows: counts on a sample of rows, compared with the expectations of the configuration."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like.config.objectives import Objective
from t5x_like.data.inspection.goodness_of_fit import Fit
from t5x_like.data.inspection.mixture_shares import MixtureShare, mixture_shares
from t5x_like.data.inspection.noise_distributions import ObservedNoise
from t5x_like.data.inspection.store_statistics import LengthSummary, summarize_lengths
from t5x_like.data.objectives.registry import implementation, restore
from t5x_like.data.stream import rng
from t5x_like.data.stream.feature_converters import Features
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.data.stream.unpack import Stack, UnpackedExample, examples, num_tokens
from t5x_like.data.tokenizers.vocabulary import Vocabulary

NGRAM = 8
_BATCHES_COMPARED = 16
_SAMPLES = 2

Progress = Callable[[int], None]


@dataclasses.dataclass
class StackFill:
    """Token positions of one stack in the sampled rows of a sub-batch, and how many of them are filled."""

    sub_batch: str
    stack: str
    rows: int = 0
    examples: int = 0
    positions: int = 0
    filled: int = 0

    @property
    def share(self) -> float:
        return self.filled / self.positions if self.positions else 0.0


@dataclasses.dataclass
class ExampleTally:
    """Counts of the sampled examples of one corpus under one objective.

    Attributes:
      corpus, objective: Indices of the corpus and of the objective.
      rows: Rows; a row of several examples is divided among them.
      examples: Examples.
      raw: Raw tokens of their windows; for pairs, of inputs and targets.
      loss: Scored tokens, including sentinels and EOS.
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
    """Sampled examples of one objective.

    Attributes:
      input_lengths, target_lengths: Lengths of the examples.
      observed: Observed noise of each example.
      broken: Examples whose inputs and targets do not belong together.
    """

    input_lengths: list[int] = dataclasses.field(default_factory=list)
    target_lengths: list[int] = dataclasses.field(default_factory=list)
    observed: list[ObservedNoise] = dataclasses.field(default_factory=list)
    broken: int = 0


@dataclasses.dataclass(frozen=True)
class MixturePart:
    """Expected and measured share of a (corpus, objective) pair in the mixture.

    Attributes:
      expected, measured: Shares by example, by raw token and by loss token.
      scored: Mean number of times that the loss is on a raw token of its windows.
      exposure: Mean number of times per epoch that the loss is on a raw token of the whole corpus under this objective.
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
    """Lengths of an objective's examples, and the fits of its noise to the expected distributions."""

    objective: Objective
    examples: int
    inputs: LengthSummary
    targets: LengthSummary
    spans: LengthSummary | None
    fits: tuple[Fit, ...]
    broken: int


@dataclasses.dataclass(frozen=True)
class RowStatistics:
    """RowStatistics of a sample of rows.

    Attributes:
      repeated_ngrams: For each compared batch, the share of 8-grams of raw text that occur in another row of the batch.
      coverage: For each corpus, the share of its tokens that the rows of an epoch contain.
      samples: For each objective, its first examples.
    """

    first_row: int
    rows: int
    fill: tuple[StackFill, ...]
    parts: tuple[MixturePart, ...]
    objectives: tuple[ObjectiveStatistics, ...]
    repeated_ngrams: tuple[float, ...]
    coverage: Mapping[str, float]
    samples: tuple[tuple[Objective, tuple[UnpackedExample, ...]], ...]

    @property
    def fill_share(self) -> float:
        """Share of token positions that are not padding, over all stacks and sub-batches."""
        positions = sum(fill.positions for fill in self.fill)
        return sum(fill.filled for fill in self.fill) / positions if positions else 0.0


def row_statistics(
    stream: TrainingStream, rows: int, first_row: int = 0, progress: Progress | None = None
) -> RowStatistics:
    """Read complete batches of the stream, at least `rows` rows in total, and return their statistics.

    One batch is in memory at a time. Of each example, only its lengths are kept.

    Args:
      stream: Training stream.
      rows: Minimum number of rows, at least one.
      first_row: Number of rows of the run before the sample.
      progress: Called with the number of rows read so far.
    """
    sample = RowSample(stream.data.objectives, stream.vocabulary)
    read = 0
    while read < rows:
        sample.add(dict(_batch(stream, first_row + read)))
        read += stream.batch_size
        if progress:
            progress(min(read, rows))
    return sample.result(stream, first_row, read)


def _batch(stream: TrainingStream, first_row: int) -> Iterator[tuple[str, tuple[Features, npt.NDArray[np.int64]]]]:
    """Yield (sub-batch, (features, corpus of each row))."""
    for name, features in stream.batch_at(first_row).items():
        first = stream.first_index(name, first_row)
        index_N = np.arange(first, first + len(features["denoiser_ids"]), dtype=np.int64)
        yield name, (features, stream.corpus_of(index_N, name))


class RowSample:
    """Accumulates counts over rows, batch by batch."""

    def __init__(self, objectives: Sequence[Objective], vocabulary: Vocabulary):
        self._objectives = objectives
        self._vocabulary = vocabulary
        self._fill: dict[tuple[str, str], StackFill] = {}
        self._tallies: dict[tuple[int, int], ExampleTally] = {}
        self._by_objective = [ObjectiveSample() for _ in objectives]
        self._repeated: list[float] = []
        self._batches = 0
        self._samples: list[list[UnpackedExample]] = [[] for _ in objectives]

    def add(self, batch: Mapping[str, tuple[Features, npt.NDArray[np.int64]]]) -> None:
        """Add a batch: for each sub-batch its features, and the index of each row's corpus."""
        windows: list[tuple[int, npt.NDArray[Any]]] = []
        number = 0
        for name, (features, corpus_N) in batch.items():
            num_examples = 0
            for row, corpus in enumerate(corpus_N.tolist()):
                row_examples = list(
                    examples(
                        {key: values[row] for key, values in features.items()},
                        self._objectives,
                        self._vocabulary,
                    )
                )
                num_examples += len(row_examples)
                number += 1
                for index, example in enumerate(row_examples):
                    raw = self._count(example, corpus, 1 / len(row_examples), first=index % 2 == 0)
                    if raw is not None:
                        windows.append((number, raw))
            self._count_positions(name, features, num_examples)
        if self._batches < _BATCHES_COMPARED:
            self._repeated.append(repeated_ngrams(windows))
        self._batches += 1

    def _count_positions(self, sub_batch: str, features: Features, num_examples: int) -> None:
        stacks: tuple[Stack, ...] = ("encoder", "decoder")
        for stack in stacks:
            if f"{stack}_input_tokens" not in features:
                continue
            tokens = features[f"{stack}_input_tokens"]
            fill = self._fill.setdefault((sub_batch, stack), StackFill(sub_batch, stack))
            fill.rows += len(tokens)
            fill.examples += num_examples
            fill.positions += tokens.size
            # A row without an example is padding only.
            for row in np.flatnonzero(features["denoiser_ids"].reshape(len(tokens), -1).max(axis=1) >= 0):
                values = {name: column[row] for name, column in features.items()}
                fill.filled += num_tokens(values, stack, self._vocabulary)

    def _count(self, example: UnpackedExample, corpus: int, share: float, *, first: bool) -> npt.NDArray[Any] | None:
        """Count one example and return its raw tokens; None if they cannot be restored."""
        vocabulary, objective = self._vocabulary, self._objectives[example.denoiser]
        sample = self._by_objective[example.denoiser]
        if len(self._samples[example.denoiser]) < _SAMPLES:
            self._samples[example.denoiser].append(example)
        sample.input_lengths.append(len(example.inputs))
        sample.target_lengths.append(len(example.targets))
        tally = self._tallies.setdefault((corpus, example.denoiser), ExampleTally(corpus, example.denoiser))
        tally.rows += share
        tally.examples += 1
        tally.loss += int(example.scored.sum())
        try:
            raw = restore(example.inputs, example.targets, objective, vocabulary)
            sample.observed.append(implementation(objective).observe(example, len(raw), vocabulary, first=first))
        except ValueError:
            sample.broken += 1
            return None
        tally.raw += len(raw)
        tally.scored_text += scored_text(example, vocabulary)
        return raw

    def result(self, stream: TrainingStream, first_row: int, rows: int) -> RowStatistics:
        """Return the statistics, with the expectations of the stream's configuration."""
        objectives = [
            ObjectiveStatistics(
                objective,
                len(sample.input_lengths),
                summarize_lengths(np.array(sample.input_lengths, np.int64)),
                summarize_lengths(np.array(sample.target_lengths, np.int64)),
                _span_lengths(sample.observed),
                tuple(
                    implementation(objective).noise_fits(sample.observed, self._vocabulary) if sample.observed else ()
                ),
                sample.broken,
            )
            for objective, sample in zip(self._objectives, self._by_objective, strict=True)
        ]
        shares = mixture_shares(stream)
        return RowStatistics(
            first_row=first_row,
            rows=rows,
            fill=tuple(self._fill.values()),
            parts=tuple(self._parts(stream, shares)),
            objectives=tuple(objectives),
            repeated_ngrams=tuple(self._repeated),
            coverage=_coverage(stream, shares),
            samples=tuple(
                (objective, tuple(first_examples))
                for objective, first_examples in zip(self._objectives, self._samples, strict=True)
            ),
        )

    def _parts(self, stream: TrainingStream, shares: Iterable[MixtureShare]) -> Iterator[MixturePart]:
        names = [objective.name for objective in self._objectives]
        corpora = [source.name for source in stream.sources]
        columns = ("rows", "raw", "loss")
        totals = [sum(getattr(tally, name) for tally in self._tallies.values()) or 1 for name in columns]
        for share in shares:
            index, corpus = names.index(share.name), corpora.index(share.corpus)
            tally = self._tallies.get((corpus, index), ExampleTally(corpus, index))
            scored = tally.scored_text / tally.raw if tally.raw else 0.0
            measured = [getattr(tally, name) / total for name, total in zip(columns, totals, strict=True)]
            yield MixturePart(
                corpus=share.corpus,
                objective=self._objectives[index],
                sub_batch=share.sub_batch,
                examples=tally.examples,
                expected=(share.by_example, share.by_token, share.by_loss_token),
                measured=(measured[0], measured[1], measured[2]),
                scored=scored,
                exposure=scored * _covered(stream, shares_of(shares, share.corpus), share),
            )


def shares_of(shares: Iterable[MixtureShare], corpus: str) -> list[MixtureShare]:
    """Return the shares of one corpus."""
    return [share for share in shares if share.corpus == corpus]


def _covered(stream: TrainingStream, corpus_shares: Sequence[MixtureShare], share: MixtureShare) -> float:
    """Return the share of a corpus's tokens that an epoch contains under one of its objectives."""
    source = next(source for source in stream.sources if source.name == share.corpus)
    examples = sum(other.by_example for other in corpus_shares)
    if not examples or not source.split.num_tokens:
        return 0.0
    rows = stream.rows_per_epoch[share.corpus] * share.by_example / examples
    return rows * share.tokens / source.split.num_tokens


def _coverage(stream: TrainingStream, shares: Sequence[MixtureShare]) -> dict[str, float]:
    coverage: dict[str, float] = collections.defaultdict(float)
    for share in shares:
        coverage[share.corpus] += _covered(stream, shares_of(shares, share.corpus), share)
    return dict(coverage)


def _span_lengths(observed: Sequence[ObservedNoise]) -> LengthSummary | None:
    spans = [length for one in observed for length in one.spans]
    return summarize_lengths(np.array(spans, np.int64)) if spans else None


def scored_text(example: UnpackedExample, vocabulary: Vocabulary) -> int:
    """Count the scored tokens that are text: neither sentinels, nor mode tokens, nor the EOS that the objective
    adds."""
    is_text = example.scored & (example.targets < vocabulary.base_size)
    if example.aligned or not len(is_text):
        return int(is_text.sum())
    if example.targets[-1] == vocabulary.eos_id and is_text[-1]:
        is_text[-1] = False
    # If sentinels are not scored, each span begins with an unscored sentinel and ends with an added EOS, which stands
    # before the next sentinel.
    starts = np.flatnonzero(~example.scored & (example.targets >= vocabulary.base_size))
    ends = starts[starts > 0] - 1
    is_text[ends[example.targets[ends] == vocabulary.eos_id]] = False
    return int(is_text.sum())


def repeated_ngrams(windows: Sequence[tuple[int, npt.NDArray[Any]]], size: int = NGRAM) -> float:
    """Return the share of the n-grams of a batch that also occur in another of its rows.

    Args:
      windows: (row, raw tokens). An n-gram lies within one window.
      size: Number of tokens of an n-gram.
    """
    hashes, rows = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for row, tokens in windows:
        count = len(tokens) - size + 1
        if count > 0:
            hashed = np.zeros(count, np.uint64)
            # Token k of all n-grams is folded in at once.
            for k in range(size):
                hashed = rng.fold_in(hashed, tokens[k : k + count])
            hashes.append(hashed)
            rows.append(np.full(count, row))
    hash_M, row_M = np.concatenate(hashes), np.concatenate(rows)
    if not len(hash_M):
        return 0.0
    _, ngram_M = np.unique(hash_M, return_inverse=True)
    # Distinct (n-gram, row) pairs give the number of rows of each n-gram.
    occurrences = np.unique(np.stack([ngram_M, row_M]), axis=1)
    num_rows = np.bincount(occurrences[0])
    return float((num_rows[ngram_M] > 1).mean())
