"""Planning of packed rows, from the lengths of the documents alone.

Documents in a pseudo-random order are put into the first of the open rows that has enough free positions. A small
corpus is planned at once; a large one in parts, so that the memory that this needs does not grow with the corpus.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, assert_never

import numpy as np

from t5x_like.config.data import DataConfig
from t5x_like.config.objectives import Objective
from t5x_like.data.store import stored_plan
from t5x_like.data.store.stored_plan import PlanTotals, StoredPlan, StoredPlanWriter
from t5x_like.data.store.token_store import Split
from t5x_like.data.stream import first_fit, rng
from t5x_like.data.stream.packing_plan import PackedExample, PackingPlan, PlanBuilder, WordColumn, damaged_plan
from t5x_like.data.stream.pair_lengths import cut_pairs
from t5x_like.errors import DataError
from t5x_like.utils.progress import ProgressDisplay
from t5x_like.utils.sanitize import say
from t5x_like.utils.type_aliases import IntArray

DOCUMENTS_PER_PART = 2**21
"""Documents of one part of a plan."""
EXAMPLES_PER_PART = 2**23
"""Examples of one part of a plan, on average: long documents are several examples each."""
SHOWN_DOCUMENTS = 2**17
"""A plan of more documents that is not stored is announced, because it takes seconds or longer."""
_VERSION = 1
"""Version of the algorithm. A change makes plans that are stored useless."""
# Uses of the key. Changing a number changes the data of every seed.
ORDER, _OBJECTIVE, SHUFFLE, _PART = range(1, 5)


def _fields(objective: Objective) -> dict[str, Any]:
    """Return the fields of an objective that a plan can depend on: mask rates are not among them."""
    return {name: value for name, value in dataclasses.asdict(objective).items() if name != "mask_rate_schedule"}


class PackingPlanner:
    """Makes the packing plan of one corpus, or opens the one that `prepare` has stored.

    Args:
      split: Split of the corpus's store.
      sequences_per_document: 1 for documents of text, 2 for pairs and dialogues.
      data: Layout and lengths of the rows.
      objectives: Objectives of the corpus.
      key: Key of the order of the documents and of the draws of their objectives.
    """

    def __init__(
        self,
        split: Split,
        sequences_per_document: int,
        data: DataConfig,
        objectives: tuple[Objective, ...],
        key: rng.Keys,
    ):
        self._split = split
        self._sequences_per_document = sequences_per_document
        self._data = data
        self._objectives = objectives
        self._key = key
        # A pair is one example, whatever its length.
        examples = split.num_tokens // max(min(self._windows()), 1) if sequences_per_document == 1 else 0
        self._parts_of_documents = max(-(-split.num_documents // DOCUMENTS_PER_PART), 1)
        parts = max(self._parts_of_documents, -(-examples // EXAMPLES_PER_PART))
        self.num_parts = max(min(parts, split.num_documents), 1)

    @property
    def identity(self) -> dict[str, Any]:
        """JSON object with everything that the plan is a function of."""
        lengths = zip(self._objectives, self._windows(), strict=True)
        return {
            "version": _VERSION,
            "parts": [self.num_parts, first_fit.LANES, first_fit.OPEN_ROWS],
            "offsets": self._split.offsets_fingerprint,
            "sequences_per_document": self._sequences_per_document,
            "rows": [self._data.layout, self._data.inputs_length, self._data.targets_length],
            "objectives": [
                # Of a plug-in, the code can change while its fields stay the same.
                [_fields(objective), window, list(objective.longest_example(window))]
                for objective, window in lengths
            ],
            "key": int(self._key[0]),
        }

    @property
    def parts_identity(self) -> dict[str, int]:
        """JSON object that identifies how a plan of several parts is made; empty for a plan of one part."""
        if self.num_parts == 1:
            return {}
        # Plans of parts by documents are named as they were before parts were also made by examples.
        parts = {} if self.num_parts == self._parts_of_documents else {"parts": self.num_parts}
        return {"documents": DOCUMENTS_PER_PART, "lanes": first_fit.LANES, **parts}

    def open(self) -> PackingPlan:
        """Return the stored plan, or make it if there is none.

        Raises:
          DataError: the stored plan is damaged, or no document is left.
        """
        stored = self._open_stored()
        if stored is not None:
            return self._readable(stored.totals, stored.examples, stored.first_example)
        if self._split.num_documents > SHOWN_DOCUMENTS:
            say(
                f"{self._split.path}: no packing plan is stored for this seed, objectives and lengths of rows, so it "
                "is made at each start; `t5x-like prepare RECIPE` with the same options stores it",
                file=sys.stderr,
            )
            with ProgressDisplay(self._split.num_documents, "packing", report=_report) as display:
                return self.make(display)
        return self.make()

    def make(self, display: ProgressDisplay | None = None, count: int | None = None) -> PackingPlan:
        """Make the plan, in memory if it has one part, and in temporary files otherwise.

        Args:
          display: Shows the progress in documents.
          count: Number of its first examples that are needed; None: all. The plan may have more.

        Raises:
          DataError: no document is left.
        """
        folder = self._split.folder if self.num_parts > 1 else None
        examples, first_example = WordColumn(folder), WordColumn(folder)
        totals = self._write(examples, first_example, display, count)
        return self._readable(totals, examples.finish(), first_example.finish())

    def is_stored(self) -> bool:
        """Return whether the plan is stored; a damaged one is not."""
        try:
            return self._open_stored() is not None
        except DataError:
            return False

    def _open_stored(self) -> StoredPlan | None:
        stored = stored_plan.open_plan(self._split.path, self.identity)
        if stored is not None:
            # The totals may come from others: the shares of the objectives are divided by the rows.
            rows, objectives = stored.totals.rows, len(stored.totals.objectives)
            if not rows or objectives != len(self._objectives):
                raise damaged_plan(f"{rows:,} rows of {objectives} objectives")
        return stored

    def store(self, display: ProgressDisplay) -> PlanTotals:
        """Make and store the plan, and return its counts.

        Args:
          display: Shows the progress in documents.

        Raises:
          DataError: no document is left, or the storage refuses it.
          OSError: the plan cannot be written.
        """
        writer = StoredPlanWriter(self._split.path, self.identity)
        totals = self._write(writer.examples, writer.first_example, display)
        writer.commit(totals)
        return totals

    def _readable(self, totals: PlanTotals, examples: Any, first_example: Any) -> PackingPlan:
        has_inputs = self._sequences_per_document == 2
        return PackingPlan(totals, examples, first_example, self._split.num_tokens, has_inputs=has_inputs)

    def _write(
        self, examples: Any, first_example: Any, display: ProgressDisplay | None, count: int | None = None
    ) -> PlanTotals:
        has_inputs = self._sequences_per_document == 2
        builder = PlanBuilder(self._objectives, examples, first_example, has_inputs=has_inputs)
        counts: dict[str, int] = {}
        for part in range(self.num_parts):
            documents, found = self._plan_part(builder, part, count)
            counts = {name: counts.get(name, 0) + number for name, number in found.items()}
            if display is not None:
                display.advance(documents, f"packing: part {part + 1:,} of {self.num_parts:,}")
            if count is not None and builder.num_examples >= count:
                break
        totals = builder.finish()
        if not totals.rows:
            raise DataError(
                f"{self._split.name} split of {self._split.num_documents:,} documents: found none of at least two "
                "tokens, expected documents to train on"
            )
        return totals.model_copy(update=counts)

    def _plan_part(self, builder: PlanBuilder, part: int, count: int | None) -> tuple[int, dict[str, int]]:
        """Append a part of the documents to a plan; return their number and the counts of `PlanTotals`.

        Of a plan of one part, only the first rows are appended if they have `count` examples.
        """
        sequences = self._sequences_per_document
        # Parts of nearly equal numbers of documents, without gap or overlap.
        first, last = (self._split.num_documents * index // self.num_parts for index in (part, part + 1))
        bounds = self._split.offsets_of(first * sequences, last * sequences).astype(np.int64)
        key = self._key
        if self.num_parts > 1:
            # Otherwise all parts would draw the same order and the same objectives by index.
            key = rng.fold_in(rng.fold_in(key, _PART), part)
        if sequences == 1:
            examples, counts = self._text_examples(bounds, key)
        elif self._objectives[0].example_source == "dialogues":
            examples, counts = self._dialogue_examples(bounds)
        else:
            examples, counts = self._pair_examples(bounds)
        if len(examples):
            # Sorting random words gives a random order of the examples.
            words_N = rng.bits(rng.fold_in(key, ORDER), 0, len(examples))[0]
            examples = examples.select(np.argsort(words_N, kind="stable"))
            positions_NxK = self._max_positions(examples)
            if self.num_parts > 1:
                row_N = first_fit.first_fit_in_lanes(positions_NxK, self._capacity, first_fit.LANES)
            elif count is None:
                row_N = first_fit.first_fit(positions_NxK, self._capacity)
            else:
                example_N, row_N = first_fit.first_fit_of_first(positions_NxK, self._capacity, count)
                examples = examples.select(example_N)
            builder.append(examples, row_N)
        return last - first, counts

    @property
    def _capacity(self) -> tuple[int, ...]:
        """Token positions of a row, by stack."""
        return tuple(self._data.row_positions.values())

    def _windows(self) -> list[int]:
        """Return the raw tokens of the longest window of each objective."""
        data = self._data
        return [
            objective.raw_window_length(data.layout, data.inputs_length, data.targets_length)
            for objective in self._objectives
        ]

    def _text_examples(self, bounds: IntArray, key: rng.Keys) -> tuple[PackedExample, dict[str, int]]:
        """Return the examples of documents without their EOS, and counts. `bounds` are the offsets of the documents.

        Each document gets an objective, drawn by the rates. A document that is longer than a window of its objective is
        cut into chunks.
        """
        # Each document ends in EOS, which the objective adds again at its own place.
        first_D, length_D = bounds[:-1], np.diff(bounds) - 1
        rates = np.array([objective.rate for objective in self._objectives])
        word_D = rng.bits(rng.fold_in(key, _OBJECTIVE), 0, len(first_D))[0]
        # The upper 53 bits of a word as a float in [0, 1), looked up in the cumulative rates.
        uniform_D = (word_D >> np.uint64(11)).astype(np.float64) * 2.0**-53
        # Without the last boundary, which rounding can leave below 1: a draw above it would have no objective.
        objective_D = np.searchsorted(np.cumsum(rates / rates.sum())[:-1], uniform_D, side="right")
        window_D = np.array(self._windows())[objective_D]
        chunks_D = -(-length_D // window_D)
        document_N = np.repeat(np.arange(len(first_D)), chunks_D)
        # 0, 1, ... within each document.
        chunk_N = np.arange(len(document_N)) - np.repeat(np.cumsum(chunks_D) - chunks_D, chunks_D)
        # The chunks of a document have nearly equal lengths, so that none is a remainder of a token or two.
        start_N = chunk_N * length_D[document_N] // chunks_D[document_N]
        stop_N = (chunk_N + 1) * length_D[document_N] // chunks_D[document_N]
        is_long_enough = stop_N - start_N >= 2
        targets = (first_D[document_N] + np.stack([start_N, stop_N]))[:, is_long_enough].T
        objective_N = objective_D[document_N][is_long_enough]
        examples = PackedExample(objective_N, np.zeros_like(targets), targets, np.zeros_like(objective_N))
        return examples, {"too_short": int((length_D < 2).sum())}

    def _pair_examples(self, bounds: IntArray) -> tuple[PackedExample, dict[str, int]]:
        """Return pairs, cut to fit a row, and counts."""
        # A pair is two sequences that follow each other in the store: boundaries 2n, 2n + 1 and 2n + 2 delimit inputs
        # and targets.
        inputs = np.stack([bounds[:-1:2], bounds[1::2]], axis=1)
        targets = np.stack([bounds[1::2], bounds[2::2]], axis=1)
        pairs = cut_pairs(inputs, targets, self._data, self._objectives[0].mode_tokens)
        has_targets = np.diff(pairs.targets_NxB)[:, 0] > 0
        counts = {
            "cut_inputs": int(pairs.cut_inputs_N.sum()),
            "cut_targets": int(pairs.cut_targets_N.sum()),
            "truncated": int((pairs.cut_inputs_N | pairs.cut_targets_N).sum()),
            "too_short": int((~has_targets).sum()),
        }
        cut_N = pairs.cut_targets_N.astype(np.int64)
        examples = PackedExample(np.zeros_like(cut_N), pairs.inputs_NxB, pairs.targets_NxB, cut_N)
        return examples.select(np.flatnonzero(has_targets)), counts

    def _dialogue_examples(self, bounds: IntArray) -> tuple[PackedExample, dict[str, int]]:
        """Return the ids and masks of dialogues, cut at their end to the length of a row, and counts."""
        ids = np.stack([bounds[:-1:2], bounds[1::2]], axis=1)
        masks = np.stack([bounds[1::2], bounds[2::2]], axis=1)
        length_N = np.diff(ids)[:, 0]
        kept_N = np.minimum(length_N, self._data.row_length)
        cut_N = length_N > kept_N
        ids[:, 1], masks[:, 1] = ids[:, 0] + kept_N, masks[:, 0] + kept_N
        examples = PackedExample(np.zeros(len(ids), np.int64), ids, masks, cut_N.astype(np.int64))
        return examples, {"cut_targets": int(cut_N.sum()), "truncated": int(cut_N.sum())}

    def _max_positions(self, examples: PackedExample) -> IntArray:
        """Return [N, K]: an upper bound on the token positions of each example in each of K stacks.

        The exact number can depend on the noise, which differs between epochs, while the plan is the same.
        """
        text_N = np.diff(examples.targets_NxB)[:, 0]
        positions = np.empty((len(text_N), len(self._capacity)), np.int64)
        for index, objective in enumerate(self._objectives):
            selected = np.flatnonzero(examples.objective_N == index)
            match objective.example_source:
                case "dialogues":
                    positions[selected] = text_N[selected, None]
                case "pairs":
                    input_positions = np.diff(examples.inputs_NxB[selected])[:, 0] + 1 + objective.mode_tokens
                    # Each side is ended by EOS, which the store of pairs does not contain.
                    both = np.stack([input_positions, text_N[selected] + 1], axis=1)
                    positions[selected] = both if positions.shape[1] == 2 else both.sum(axis=1, keepdims=True)
                case "text":
                    # Lengths are computed once for each distinct document length.
                    lengths, which = np.unique(text_N[selected], return_inverse=True)
                    longest = [objective.longest_example(length) for length in lengths.tolist()]
                    if positions.shape[1] == 2:
                        both = np.array([(item.inputs, item.targets) for item in longest], np.int64).reshape(-1, 2)
                        positions[selected] = both[which]
                    else:
                        single = [item.total if self._has_single_stream else item.inputs for item in longest]
                        positions[selected] = np.array(single, np.int64)[which, None]
                case "labelled" | "preferences":
                    raise AssertionError("labelled examples and preference pairs have readers of their own")
                case source:
                    assert_never(source)
        return positions

    @property
    def _has_single_stream(self) -> bool:
        """True if inputs and targets follow each other in the decoder."""
        return tuple(self._data.row_positions) == ("decoder",)


def _report(line: str) -> None:
    say(line, file=sys.stderr)
