"""Phase planning: the composition of the periods of each phase, and the position of each corpus at its beginning."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from t5x_like.config.batch_sizes import BatchSizes
from t5x_like.config.data import DataConfig
from t5x_like.config.mixture_schedule import Phase, blocks_per_period, corpus_rates, phases, rows_per_block
from t5x_like.config.objectives import Objective
from t5x_like.data.store.token_store import Split
from t5x_like.data.stream.labeled_rows import LabeledRows
from t5x_like.data.stream.mixture_index import PhasePlan, periods_in
from t5x_like.data.stream.packing import PackedRows
from t5x_like.data.stream.preference_rows import PackedPreferenceRows, PreferenceRows
from t5x_like.data.stream.windows import Windows
from t5x_like.errors import DataError

_MIN_PERIODS = 20
"""Minimum number of periods in a phase that ends, unless the phase is short."""

Reader = Windows | PackedRows | LabeledRows | PreferenceRows | PackedPreferenceRows


@dataclasses.dataclass(frozen=True)
class CorpusSource:
    """Corpus of the mixture, ready to be read.

    Attributes:
      name: Name of the corpus.
      split: Split of its store.
      objectives: Its objectives.
      objective_ids: Indices of these objectives in `data.objectives`.
      reader: Reader of windows, packed documents, labelled examples or preference pairs.
    """

    name: str
    split: Split
    objectives: tuple[Objective, ...]
    objective_ids: tuple[int, ...]
    reader: Reader

    def rows_per_block(self, data: DataConfig, phase: Phase) -> tuple[int, ...]:
        """Return the rows of each objective in a block.

        A row of whole examples is a block of its own, and its examples may be under several objectives.
        """
        if not isinstance(self.reader, Windows):
            return (1,)
        return rows_per_block(self.objectives, data, phase.objectives)


def plan_phases(
    sources: Sequence[CorpusSource], data: DataConfig, batch_sizes: BatchSizes, split: str
) -> list[PhasePlan]:
    """Return the plan of each phase, and begin the epoch spans of the sources' windows.

    Args:
      sources: Corpora of the mixture.
      data: Mixture and schedule of the rates.
      batch_sizes: Rows of each step, which convert the steps of the schedule to rows.
      split: Name of the split, for messages.

    Raises:
      DataError: a corpus has less text than one block needs.
    """
    changes = phases(data)
    sizes = [source.split.num_tokens for source in sources]
    # Position of each corpus: its epoch span, and the blocks of the span that earlier phases have used.
    used_blocks = [0] * len(sources)
    epoch_spans = [-1] * len(sources)
    previous: list[tuple[int, ...] | None] = [None] * len(sources)
    plans: list[PhasePlan] = []
    for index, change in enumerate(changes):
        counts_by_corpus = [source.rows_per_block(data, change) for source in sources]
        for corpus, source in enumerate(sources):
            counts = counts_by_corpus[corpus]
            if not isinstance(source.reader, Windows):
                # Rows of whole examples are the same at any rates, so their corpus is never cut again.
                epoch_spans[corpus] = 0
            elif counts != previous[corpus]:
                # The corpus is cut in other proportions from here on, so a new epoch span begins.
                epoch_spans[corpus] = _begin_span(source, source.reader, counts, used_blocks[corpus], split)
                used_blocks[corpus] = 0
            previous[corpus] = counts
        rates = corpus_rates(data.corpus_mixing, change, dict(zip(change.corpora, sizes, strict=True)))
        # A block has several rows, so its rate is that of the corpus divided by their number.
        block_rates = [rate / sum(counts) for rate, counts in zip(rates, counts_by_corpus, strict=True)]
        first_row, rows = batch_sizes.rows_before(change.start_step), None
        if index + 1 < len(changes):
            rows = batch_sizes.rows_before(changes[index + 1].start_step) - first_row
        # The unused part of a phase's last period is not read, so a phase that ends needs short periods.
        max_blocks = None if rows is None else rows // (_MIN_PERIODS * max(map(sum, counts_by_corpus)))
        num_blocks = blocks_per_period(block_rates, max_blocks)
        plan = PhasePlan(first_row, tuple(counts_by_corpus), num_blocks, tuple(epoch_spans), tuple(used_blocks))
        plans.append(plan)
        if rows is not None:
            # The next phase continues after whole periods.
            periods = periods_in(rows, plan.rows_per_period)
            used_blocks = [used + periods * n for used, n in zip(used_blocks, num_blocks, strict=True)]
    return plans


def _begin_span(source: CorpusSource, windows: Windows, counts: tuple[int, ...], used_blocks: int, split: str) -> int:
    """Begin an epoch span after `used_blocks` blocks of the previous one, and return its index."""
    needed, tokens = windows.block_tokens(counts), source.split.num_tokens
    if tokens < needed:
        raise DataError(
            f"corpus {source.name}: found {tokens:,} {split} tokens, expected at least {needed:,}, one window for each "
            f"of the {sum(counts)} rows of a block; use more text or shorter rows"
        )
    epoch, offset = windows.end_span(used_blocks) if windows.epoch_spans else (0, 0)
    return windows.begin_span(counts, epoch, offset)
