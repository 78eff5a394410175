"""Mixture index: maps a row index to its corpus, objective and rank, by arithmetic and without reading any text.

The rows of a run form equal periods. A period has a fixed number of rows for each (corpus, objective) pair, in a random
order of its own. Corpus c contributes `blocks_per_period[c]` blocks, which are pieces of its text that are cut in the
proportions of the objectives. Rates are therefore exact over each period, the objectives of a corpus are used up at the
same pace, and row i is found without any row before it.

Rows of different shapes (sub-batches) are numbered separately. A change of the rates begins a new phase, whose periods
have other numbers of rows. If it changes how a corpus is cut, it also begins a new epoch span of that corpus.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from t5x_like.data.stream import rng
from t5x_like.utils.type_aliases import IntArray


@dataclasses.dataclass(frozen=True)
class RowOrigin:
    """Origin of N rows.

    Attributes:
      corpus_N: Index of the corpus.
      objective_N: Index of the objective among those of the corpus.
      epoch_span_N: Index of the corpus's epoch span.
      rank_N: Number of earlier rows of this corpus and objective in the epoch span.
    """

    corpus_N: IntArray
    objective_N: IntArray
    epoch_span_N: IntArray
    rank_N: IntArray


@dataclasses.dataclass(frozen=True)
class PhasePlan:
    """Composition of the periods of one phase. All tuples have one entry per corpus.

    Attributes:
      first_row: Row of the run, over all shapes, with which the phase begins.
      rows_per_block: Rows of each objective in a block.
      blocks_per_period: Blocks that a period takes.
      epoch_spans: Index of the epoch span that is read.
      used_blocks: Blocks of that span that earlier phases have used.
    """

    first_row: int
    rows_per_block: tuple[tuple[int, ...], ...]
    blocks_per_period: tuple[int, ...]
    epoch_spans: tuple[int, ...]
    used_blocks: tuple[int, ...]

    @property
    def rows_per_period(self) -> int:
        """Rows of a period, over all shapes."""
        return sum(n * sum(rows) for n, rows in zip(self.blocks_per_period, self.rows_per_block, strict=True))

    def identity(self) -> dict[str, object]:
        """Return the plan as JSON values for the stream's fingerprint.

        The keys are part of every fingerprint that was ever recorded, so they do not follow the names of the fields.
        """
        return {
            "first_row": self.first_row,
            "patterns": self.rows_per_block,
            "superblocks": self.blocks_per_period,
            "stretches": self.epoch_spans,
            "used": self.used_blocks,
        }


def periods_in(rows: int, rows_per_period: int) -> int:
    """Return the number of periods that `rows` rows begin. The rest of the last period of a phase is not read."""
    return -(-rows // rows_per_period)


class MixtureIndex:
    """Index of the rows of one shape.

    Args:
      phases: Phases in order; the first begins with row 0.
      in_shape: For each corpus and objective, whether its rows have this shape.
      fraction: (rows of this shape, rows of all shapes) as whole numbers, the same in every phase.
      key: Key of the order within periods.
    """

    def __init__(
        self,
        phases: Sequence[PhasePlan],
        in_shape: Sequence[Sequence[bool]],
        fraction: tuple[int, int],
        key: rng.Keys,
    ):
        self._key = key
        self._phases = phases
        # Exact: validation requires that the batch size is a multiple of the denominator, and phases begin at whole
        # steps.
        self._first_rows = np.array([phase.first_row * fraction[0] // fraction[1] for phase in phases], np.int64)
        self._tables = [_period_table(phase, in_shape) for phase in phases]

    def locate(self, row_N: IntArray) -> RowOrigin:
        """Return the origins of rows, which are numbered within the shape."""
        # The last phase that begins at or before the row.
        phase_N = np.searchsorted(self._first_rows, row_N, side="right") - 1
        columns = np.empty((4, len(row_N)), np.int64)
        for phase in np.unique(phase_N).tolist():
            in_phase = phase_N == phase
            columns[:, in_phase] = self._locate_in_phase(phase, row_N[in_phase] - self._first_rows[phase])
        return RowOrigin(*columns)

    def _locate_in_phase(self, phase: int, row_N: IntArray) -> IntArray:
        table = self._tables[phase]
        rows_per_period = int(table["end"][-1])
        # A period is a list of rows grouped by (corpus, objective) pair. A keyed permutation, which differs between
        # periods, shuffles the list.
        period_N, position_N = np.divmod(row_N, rows_per_period)
        period_key_N = rng.fold_in(rng.fold_in(self._key, phase), period_N)
        position_N = rng.permute(position_N, rows_per_period, period_key_N)
        # The pair whose range of the list contains the position, and the rank of the row within this range.
        pair_N = np.searchsorted(table["end"], position_N, side="right")
        per_period_N = table["rows_per_period"][pair_N]
        rank_in_period_N = position_N - (table["end"][pair_N] - per_period_N)
        # Rows of the pair before this one: of earlier phases, of earlier periods, and of this period.
        rank_N = table["used_rows"][pair_N] + period_N * per_period_N + rank_in_period_N
        return np.stack([table["corpus"][pair_N], table["objective"][pair_N], table["epoch_span"][pair_N], rank_N])


def _period_table(phase: PhasePlan, in_shape: Sequence[Sequence[bool]]) -> Mapping[str, IntArray]:
    """Return the columns of a period's table, with one row per (corpus, objective) pair.

    `rows_per_period` is the number of rows of the pair, `end` its cumulative end offset, and `used_rows` the number of
    rows of the pair that earlier phases have used of the epoch span.
    """
    names = ("corpus", "objective", "epoch_span", "rows_per_period", "used_rows")
    columns: dict[str, list[int]] = {name: [] for name in names}
    for corpus, rows_per_block in enumerate(phase.rows_per_block):
        for objective, count in enumerate(rows_per_block):
            rows_per_period = count * phase.blocks_per_period[corpus]
            if not rows_per_period or not in_shape[corpus][objective]:
                continue
            columns["corpus"].append(corpus)
            columns["objective"].append(objective)
            columns["epoch_span"].append(phase.epoch_spans[corpus])
            columns["rows_per_period"].append(rows_per_period)
            columns["used_rows"].append(phase.used_blocks[corpus] * count)
    table = {name: np.array(values, np.int64) for name, values in columns.items()}
    return {**table, "end": np.cumsum(table["rows_per_period"])}
