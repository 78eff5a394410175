"""Which row comes from which corpus, under which objective: arithmetic on row numbers, without a look at any text.

The rows of a run are made of equal periods. A period has a fixed number of rows for each pair of a corpus and an
objective ("kind"), in an order of its own; corpus c gives it `superblocks[c]` superblocks, stretches of its text that
are cut in the proportions of the objectives. So all rates are exact over each period, every kind of row is used up at
the same pace as the others of its corpus, and row i is found without any row before it.

Rows of several shapes (sub-batches) are numbered each for itself. A change of the rates begins a new phase, whose
periods have other slots; where it changes how a corpus is cut, it begins a new stretch of that corpus.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from t5x_like.data import keys as rng

Integers = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Places:
    """Where N rows come from.

    Attributes:
      corpus_N, objective_N: Indices into the corpora, and into the objectives of that corpus.
      stretch_N: Index of the corpus's stretch.
      number_N: How many rows of this corpus and objective the stretch has had before.
    """

    corpus_N: Integers
    objective_N: Integers
    stretch_N: Integers
    number_N: Integers


@dataclasses.dataclass(frozen=True)
class PhaseSlots:
    """A period of one phase.

    Attributes:
      first_row: Row of the run, over all shapes, that the phase begins with.
      patterns: By corpus: rows of each objective in a superblock.
      superblocks: By corpus: superblocks that a period takes.
      stretches: By corpus: index of the stretch it reads.
      used: By corpus: superblocks of that stretch that earlier phases have used.
    """

    first_row: int
    patterns: tuple[tuple[int, ...], ...]
    superblocks: tuple[int, ...]
    stretches: tuple[int, ...]
    used: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of a period, over all shapes."""
        return sum(n * sum(pattern) for n, pattern in zip(self.superblocks, self.patterns, strict=True))


def periods_in(rows: int, slots: int) -> int:
    """Periods that `rows` rows begin; what the last one leaves over at the end of a phase is not read."""
    return -(-rows // slots)


class Mixing:
    """Finds rows in the periods of one shape.

    Args:
      phases: In order; the first begins with row 0.
      in_shape: By corpus and objective: whether its rows have this shape.
      share: (rows of this shape, rows of all shapes) in whole numbers, the same in every phase.
      key: Of the order within periods.
    """

    def __init__(
        self,
        phases: Sequence[PhaseSlots],
        in_shape: Sequence[Sequence[bool]],
        share: tuple[int, int],
        key: rng.Keys,
    ):
        self._key = key
        self._phases = phases
        self._first_rows = np.array([phase.first_row * share[0] // share[1] for phase in phases], np.int64)
        self._tables = [_table(phase, in_shape) for phase in phases]

    def places(self, row_N: Integers) -> Places:
        """Where the rows with these numbers, counted within the shape, come from."""
        phase_N = np.searchsorted(self._first_rows, row_N, side="right") - 1
        columns = np.empty((4, len(row_N)), np.int64)
        for phase in np.unique(phase_N).tolist():
            here = phase_N == phase
            columns[:, here] = self._in_phase(phase, row_N[here] - self._first_rows[phase])
        return Places(*columns)

    def _in_phase(self, phase: int, row_N: Integers) -> Integers:
        kinds = self._tables[phase]
        slots = int(kinds["end"][-1])
        period_N, slot_N = np.divmod(row_N, slots)
        period_key_N = rng.fold_in(rng.fold_in(self._key, phase), period_N)
        slot_N = rng.permute(slot_N, slots, period_key_N)
        kind_N = np.searchsorted(kinds["end"], slot_N, side="right")
        each_N = kinds["each"][kind_N]
        rank_N = slot_N - (kinds["end"][kind_N] - each_N)
        number_N = kinds["before"][kind_N] + period_N * each_N + rank_N
        return np.stack([kinds["corpus"][kind_N], kinds["objective"][kind_N], kinds["stretch"][kind_N], number_N])


def _table(phase: PhaseSlots, in_shape: Sequence[Sequence[bool]]) -> Mapping[str, Integers]:
    """The kinds of a period, whose slots follow each other: how many each has, and behind the how-manieth it ends."""
    columns: dict[str, list[int]] = {name: [] for name in ("corpus", "objective", "stretch", "each", "before")}
    for corpus, pattern in enumerate(phase.patterns):
        for objective, count in enumerate(pattern):
            each = count * phase.superblocks[corpus]
            if not each or not in_shape[corpus][objective]:
                continue
            columns["corpus"].append(corpus)
            columns["objective"].append(objective)
            columns["stretch"].append(phase.stretches[corpus])
            columns["each"].append(each)
            columns["before"].append(phase.used[corpus] * count)
    table = {name: np.array(values, np.int64) for name, values in columns.items()}
    return {**table, "end": np.cumsum(table["each"])}
