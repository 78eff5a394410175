"""Packing: documents and supervised pairs of any length, several to a row, by a first-fit plan that is made once.

`prepare` makes the plan from the lengths of the documents (`packing_planner`) and stores it beside them. A row of the
plan holds the same documents in every epoch, and an epoch visits the rows in a permutation of its own. The noise of a
document differs between epochs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, assert_never

import numpy as np
import numpy.typing as npt

from t5x_like.config.data import DataConfig
from t5x_like.config.objectives import Objective
from t5x_like.data.objectives.dialogues import dialogue_examples
from t5x_like.data.objectives.examples import Examples
from t5x_like.data.objectives.registry import by_step, denoise
from t5x_like.data.objectives.supervised import pair_examples
from t5x_like.data.store.stored_plan import ObjectiveTotals
from t5x_like.data.store.token_store import Split
from t5x_like.data.stream import rng
from t5x_like.data.stream.packing_plan import PackedExample
from t5x_like.data.stream.packing_planner import SHUFFLE, PackingPlanner
from t5x_like.data.tokenizers.vocabulary import TokenTraits, Vocabulary
from t5x_like.utils.type_aliases import IntArray


class WholeExampleRows:
    """Base of the readers whose rows hold whole examples: the same rows in every epoch, in another order in each.

    Attributes:
      num_rows: Rows of an epoch.
    """

    num_rows: int
    _shuffle_key: rng.Keys

    def shuffled_rows(self, rank_N: IntArray) -> IntArray:
        """Return [N]: the row of an epoch that is visited at each rank, which counts from 0 over all epochs."""
        epoch_N, rank_in_epoch_N = np.divmod(rank_N, self.num_rows)
        return rng.permute(rank_in_epoch_N, self.num_rows, rng.fold_in(self._shuffle_key, epoch_N))

    @property
    def blocks_per_epoch(self) -> int:
        """Each row is a block."""
        return self.num_rows

    def epochs(self, epoch_span: int, blocks: float) -> float:
        """Return the fractional number of epochs after `blocks` rows. There is one epoch span only."""
        del epoch_span
        return blocks / self.num_rows


class PackedRows(WholeExampleRows):
    """Packed rows of one corpus.

    Attributes:
      num_rows: Rows of an epoch.
      totals: Counts of the plan.

    Raises:
      DataError: no document is left, or the stored plan is damaged.
    """

    def __init__(
        self,
        split: Split,
        sequences_per_document: int,
        data: DataConfig,
        objectives: tuple[Objective, ...],
        key: rng.Keys,
        *,
        num_held_out: int | None = None,
    ):
        """
        Args:
          split: Split of the corpus's store.
          sequences_per_document: 1 for documents of text, 2 for pairs and dialogues.
          data: Layout and lengths of the rows.
          objectives: Objectives of the corpus.
          key: Key of the order of the documents, of the draws of their objectives and of the order of the rows.
          num_held_out: Number of examples that are read from the beginning of the plan, which is made only that far;
            None: the rows are for training, and `prepare` has stored their plan.
        """
        planner = PackingPlanner(split, sequences_per_document, data, objectives, key)
        self._split = split
        self._objectives = objectives
        self._shuffle_key = rng.fold_in(key, SHUFFLE)
        self._parts_identity = planner.parts_identity
        self._plan = planner.open() if num_held_out is None else planner.make(count=num_held_out)
        self.totals = self._plan.totals
        self.num_rows = self.totals.rows

    @property
    def identity(self) -> Any:
        """JSON value that identifies the rule by which rows are packed, for fingerprints."""
        # Pairs that fit are the same rows under each rule of truncation that there has been.
        cut = {"pairs_cut_at": "row length"} if self.totals.truncated else {}
        return {**self._parts_identity, **cut} or True

    def row_means(self, objective: Objective) -> tuple[float, float]:
        """Return the means (raw tokens, loss tokens) per row of the plan that are under one objective."""
        found = self._totals_of(objective)
        return found.raw_tokens / self.num_rows, found.loss_tokens / self.num_rows

    def row_share(self, objective: Objective) -> float:
        """Return an objective's share of the rows. In a row of k examples each example counts 1 / k."""
        return self._totals_of(objective).rows / self.num_rows

    def _totals_of(self, objective: Objective) -> ObjectiveTotals:
        return self.totals.objectives[self._objectives.index(objective)]

    def take(self, index_M: IntArray) -> PackedExample:
        """Return examples by their index in the plan."""
        return self._plan.take(index_M)

    def examples_of_rows(self, plan_row_N: IntArray) -> tuple[PackedExample, IntArray, IntArray]:
        """Return the M examples of N rows of the plan, the index of the row in 0..N-1 of each [M], and its segment [M].

        Segments are numbered from 1 within a row.
        """
        return self._plan.examples_of_rows(plan_row_N)

    def examples(
        self,
        packed: PackedExample,
        keys_N: rng.Keys,
        objective: int,
        vocabulary: Vocabulary,
        traits: TokenTraits | None,
        step_M: IntArray | None = None,
    ) -> Iterator[tuple[IntArray, Examples]]:
        """Yield (indices, Examples) of the packed examples under one objective, grouped by length.

        `denoise` takes rows of one length, so examples of the same length are denoised together.

        Args:
          packed, keys_N: The examples and their keys.
          objective: Index of the objective.
          vocabulary, traits: See `denoise`.
          step_M: Training step that reads each example; None: they are held out.
        """
        spec = self._objectives[objective]
        selected = np.flatnonzero(packed.objective_N == objective)
        if not selected.size:
            return
        match spec.example_source:
            case "pairs":
                pairs = [(inputs.tolist(), targets.tolist()) for inputs, targets in self._both(packed, selected)]
                yield selected, pair_examples(pairs, spec, vocabulary, cut=packed.cut_N[selected].astype(bool).tolist())
            case "dialogues":
                yield selected, dialogue_examples(self._both(packed, selected), vocabulary)
            case "text":
                texts = self._split.slices(packed.targets_NxB[selected])
                lengths = np.array([len(text) for text in texts])
                for length in np.unique(lengths).tolist():
                    of_length = np.flatnonzero(lengths == length)
                    groups = [(spec, of_length)]
                    if step_M is not None:
                        groups = list(by_step(spec, of_length, step_M[selected]))
                    for scheduled, of_group in groups:
                        indices = selected[of_group]
                        tokens = np.stack([texts[index] for index in of_group])
                        yield indices, denoise(tokens, keys_N[indices], scheduled, vocabulary, traits)
            case "labelled" | "preferences":
                raise AssertionError("labelled examples and preference pairs have readers of their own")
            case source:
                assert_never(source)

    def _both(self, packed: PackedExample, selected: IntArray) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        """Return the two sequences of each selected example. All are read in parallel."""
        ranges = np.concatenate([packed.inputs_NxB[selected], packed.targets_NxB[selected]])
        sequences = self._split.slices(ranges)
        return list(zip(sequences[: len(selected)], sequences[len(selected) :], strict=True))
