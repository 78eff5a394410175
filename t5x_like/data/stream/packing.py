"""Packing: documents and supervised pairs of any length, several to a row, by a first-fit plan that is made once.

The plan is made when the store is opened, from the lengths of the documents alone: documents in a pseudo-random order
are put into the first of the open rows that has enough free positions (`packing_plan`). A row of the plan therefore
holds the same documents in every epoch, and an epoch visits the rows in a permutation of its own. The noise of a
document differs between epochs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, assert_never

import numpy as np

from t5x_like.config.data import DataConfig
from t5x_like.config.objectives import Objective
from t5x_like.data.objectives.dialogues import dialogue_examples
from t5x_like.data.objectives.examples import Examples
from t5x_like.data.objectives.registry import denoise
from t5x_like.data.objectives.supervised import pair_examples
from t5x_like.data.store.token_store import Split
from t5x_like.data.stream import packing_plan, rng
from t5x_like.data.stream.packing_plan import PackedExample, PackingPlan, first_fit, first_fit_in_lanes
from t5x_like.data.stream.pair_lengths import cut_pairs
from t5x_like.data.tokenizers.vocabulary import TokenTraits, Vocabulary
from t5x_like.errors import DataError
from t5x_like.utils.type_aliases import IntArray

# Uses of the key. Changing a number changes the data of every seed.
_ORDER, _OBJECTIVE, _SHUFFLE, _PART = range(1, 5)


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
      num_cut_inputs, num_cut_targets: Pairs whose inputs, or targets, are truncated to fit a row.
      num_truncated: Pairs of which either is truncated.
      num_too_short: Documents of fewer than two tokens, and pairs without targets, which are left out.

    Raises:
      DataError: no document is left.
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
        self._objectives = objectives
        self._key = key
        self._shuffle_key = rng.fold_in(key, _SHUFFLE)
        self._data = data
        self._sequences_per_document = sequences_per_document
        self.num_truncated = self.num_cut_inputs = self.num_cut_targets = self.num_too_short = 0
        self._num_parts = max(-(-split.num_documents // packing_plan.DOCUMENTS_PER_PART), 1)
        # One part stays in memory; the plan of several parts is written to temporary files.
        self._plan = PackingPlan(split.folder if self._num_parts > 1 else None)
        for part in range(self._num_parts):
            self._plan_part(part)
        if not self._plan.num_rows:
            raise DataError(
                f"{split.name} split of {split.num_documents:,} documents: found none of at least two tokens, expected "
                "documents to train on"
            )
        self._plan.finish()
        self.num_rows = self._plan.num_rows

    def _plan_part(self, part: int) -> None:
        """Append a part of the documents to the plan: one part of a large corpus, or all documents."""
        sequences = self._sequences_per_document
        # Parts of nearly equal numbers of documents, without gap or overlap.
        first, last = (self._split.num_documents * index // self._num_parts for index in (part, part + 1))
        bounds = self._split.offsets_of(first * sequences, last * sequences).astype(np.int64)
        key = self._key
        if self._num_parts > 1:
            # Otherwise all parts would draw the same order and the same objectives by index.
            key = rng.fold_in(rng.fold_in(key, _PART), part)
        is_pairs = sequences == 2
        if is_pairs and self._objectives[0].example_source == "dialogues":
            ranges = self._dialogue_ranges(bounds)
        else:
            ranges = self._pair_ranges(bounds) if is_pairs else self._text_ranges(bounds, key)
        inputs, targets, objective_N, cut_N, num_too_short = ranges
        self.num_too_short += num_too_short
        if not len(targets):
            return
        # Sorting random words gives a random order of the examples.
        order_N = np.argsort(rng.bits(rng.fold_in(key, _ORDER), 0, len(targets))[0])
        inputs, targets, objective_N, cut_N = (part[order_N] for part in (inputs, targets, objective_N, cut_N))
        positions = self._max_positions(inputs, targets, objective_N)
        fit = first_fit if self._num_parts == 1 else first_fit_in_lanes
        self._plan.append(objective_N, inputs, targets, cut_N, fit(positions, self._capacity))

    @property
    def identity(self) -> Any:
        """JSON value that identifies the rule by which rows are packed, for fingerprints."""
        # Pairs that fit are the same rows under each rule of truncation that there has been.
        cut = {"pairs_cut_at": "row length"} if self.num_truncated else {}
        if self._num_parts == 1:
            return cut or True
        return {"documents": packing_plan.DOCUMENTS_PER_PART, "lanes": packing_plan.LANES, **cut}

    @property
    def num_examples(self) -> int:
        """Examples of an epoch."""
        return self._plan.num_examples

    def row_means(self, objective: Objective) -> tuple[float, float]:
        """Return the means (raw tokens, loss tokens) per row of the plan that are under one objective."""
        number = self._objectives.index(objective)
        counts_L, input_tokens = np.zeros(0, np.int64), 0
        for chunk in self._plan.chunks():
            selected = chunk.objective_N == number
            # Loss tokens are a function of the length alone, so a histogram of lengths is enough.
            added_L = np.bincount(np.diff(chunk.targets_NxB[selected])[:, 0], minlength=len(counts_L))
            counts_L = added_L + np.pad(counts_L, (0, len(added_L) - len(counts_L)))
            # The two sequences of a dialogue are its tokens and their mask, of equal length.
            if objective.example_source != "dialogues":
                input_tokens += int(np.diff(chunk.inputs_NxB[selected]).sum())
        lengths = np.flatnonzero(counts_L)
        loss_tokens = [objective.expected_loss_tokens(length) for length in lengths.tolist()]
        total_loss = float(np.dot(loss_tokens, counts_L[lengths]))
        raw_tokens = int(np.dot(lengths, counts_L[lengths]))
        return float(raw_tokens + input_tokens) / self.num_rows, total_loss / self.num_rows

    def row_share(self, objective: Objective) -> float:
        """Return an objective's share of the rows. In a row of k examples each example counts 1 / k."""
        number, first = self._objectives.index(objective), self._plan.first_example
        share = 0.0
        for chunk in self._plan.chunks():
            # Number of examples in the row of each example.
            examples_N = first[chunk.row_N + 1] - first[chunk.row_N]
            share += float(((chunk.objective_N == number) / examples_N).sum())
        return share / self.num_rows

    def take(self, index_M: IntArray) -> PackedExample:
        """Return examples by their index in the plan."""
        return self._plan.take(index_M)

    def examples_of_rows(self, plan_row_N: IntArray) -> tuple[PackedExample, IntArray]:
        """Return the M examples of N rows of the plan, and [M]: for each example the index of its row in 0..N-1."""
        first = self._plan.first_example
        first_N, last_N = first[plan_row_N], first[plan_row_N + 1]
        counts_N = last_N - first_N
        row_M = np.repeat(np.arange(len(plan_row_N)), counts_N)
        # 0, 1, ... within each row: the running index less the number of examples of the rows before.
        rank_M = np.arange(counts_N.sum()) - np.repeat(np.cumsum(counts_N) - counts_N, counts_N)
        return self.take(rank_M + first_N[row_M]), row_M

    def examples(
        self,
        packed: PackedExample,
        keys_N: rng.Keys,
        objective: int,
        vocabulary: Vocabulary,
        traits: TokenTraits | None,
    ) -> Iterator[tuple[IntArray, Examples]]:
        """Yield (indices, Examples) of the packed examples under one objective, grouped by length.

        `denoise` takes rows of one length, so examples of the same length are denoised together.
        """
        spec = self._objectives[objective]
        selected = np.flatnonzero(packed.objective_N == objective)
        if not selected.size:
            return
        match spec.example_source:
            case "pairs":
                bounds = zip(packed.inputs_NxB[selected].tolist(), packed.targets_NxB[selected].tolist(), strict=True)
                pairs = [
                    (self._split.tokens(*inputs).tolist(), self._split.tokens(*targets).tolist())
                    for inputs, targets in bounds
                ]
                yield selected, pair_examples(pairs, spec, vocabulary, cut=packed.cut_N[selected].astype(bool).tolist())
            case "dialogues":
                bounds = zip(packed.inputs_NxB[selected].tolist(), packed.targets_NxB[selected].tolist(), strict=True)
                dialogues = [(self._split.tokens(*ids), self._split.tokens(*mask)) for ids, mask in bounds]
                yield selected, dialogue_examples(dialogues, vocabulary)
            case "text":
                lengths = np.diff(packed.targets_NxB[selected], axis=1)[:, 0]
                for length in np.unique(lengths).tolist():
                    indices = selected[lengths == length]
                    tokens = self._split.gather(packed.targets_NxB[indices, 0], length)
                    yield indices, denoise(tokens, keys_N[indices], spec, vocabulary, traits)
            case "labelled" | "preferences":
                raise AssertionError("labelled examples and preference pairs have readers of their own")
            case source:
                assert_never(source)

    @property
    def _capacity(self) -> tuple[int, ...]:
        """Token positions of a row, by stack."""
        return tuple(self._data.row_positions.values())

    def _text_ranges(self, bounds: IntArray, key: rng.Keys) -> tuple[IntArray, IntArray, IntArray, IntArray, int]:
        """Return (inputs, targets, objectives, 0 for each, number of too short ones) of documents without their EOS.

        `bounds` are the offsets of the documents.

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
        data = self._data
        windows = np.array(
            [
                objective.raw_window_length(data.layout, data.inputs_length, data.targets_length)
                for objective in self._objectives
            ]
        )
        window_D = windows[objective_D]
        chunks_D = -(-length_D // window_D)
        document_N = np.repeat(np.arange(len(first_D)), chunks_D)
        # 0, 1, ... within each document.
        chunk_N = np.arange(len(document_N)) - np.repeat(np.cumsum(chunks_D) - chunks_D, chunks_D)
        # The chunks of a document have nearly equal lengths, so that none is a remainder of a token or two.
        start_N = chunk_N * length_D[document_N] // chunks_D[document_N]
        stop_N = (chunk_N + 1) * length_D[document_N] // chunks_D[document_N]
        is_long_enough = stop_N - start_N >= 2
        targets = (first_D[document_N] + np.stack([start_N, stop_N]))[:, is_long_enough].T
        num_too_short = int((length_D < 2).sum())
        objective_N = objective_D[document_N][is_long_enough]
        return np.zeros_like(targets), targets, objective_N, np.zeros_like(objective_N), num_too_short

    def _pair_ranges(self, bounds: IntArray) -> tuple[IntArray, IntArray, IntArray, IntArray, int]:
        """Return (inputs, targets, objectives, 1 for cut targets, number without targets) of pairs that fit a row."""
        # A pair is two sequences that follow each other in the store: boundaries 2n, 2n + 1 and 2n + 2 delimit inputs
        # and targets.
        inputs = np.stack([bounds[:-1:2], bounds[1::2]], axis=1)
        targets = np.stack([bounds[1::2], bounds[2::2]], axis=1)
        pairs = cut_pairs(inputs, targets, self._data, self._objectives[0].mode_tokens)
        has_targets = np.diff(pairs.targets_NxB)[:, 0] > 0
        self.num_cut_inputs += int(pairs.cut_inputs_N.sum())
        self.num_cut_targets += int(pairs.cut_targets_N.sum())
        self.num_truncated += int((pairs.cut_inputs_N | pairs.cut_targets_N).sum())
        objective_N = np.zeros(int(has_targets.sum()), np.int64)
        kept = [part[has_targets] for part in (pairs.inputs_NxB, pairs.targets_NxB)]
        return (
            kept[0],
            kept[1],
            objective_N,
            pairs.cut_targets_N[has_targets].astype(np.int64),
            int((~has_targets).sum()),
        )

    def _dialogue_ranges(self, bounds: IntArray) -> tuple[IntArray, IntArray, IntArray, IntArray, int]:
        """Return (ids, masks, objectives, 1 for cut ones, 0) of dialogues, cut at their end to the length of a row."""
        ids = np.stack([bounds[:-1:2], bounds[1::2]], axis=1)
        masks = np.stack([bounds[1::2], bounds[2::2]], axis=1)
        length_N = np.diff(ids)[:, 0]
        kept_N = np.minimum(length_N, self._data.row_length)
        cut_N = length_N > kept_N
        self.num_cut_targets += int(cut_N.sum())
        self.num_truncated += int(cut_N.sum())
        ids[:, 1], masks[:, 1] = ids[:, 0] + kept_N, masks[:, 0] + kept_N
        return ids, masks, np.zeros(len(ids), np.int64), cut_N.astype(np.int64), 0

    def _max_positions(self, inputs: IntArray, targets: IntArray, objective_N: IntArray) -> IntArray:
        """Return [N, K]: an upper bound on the token positions of each example in each of K stacks.

        The exact number can depend on the noise, which differs between epochs, while the plan is the same.
        """
        text_N = np.diff(targets)[:, 0]
        positions = np.empty((len(text_N), len(self._capacity)), np.int64)
        for index, objective in enumerate(self._objectives):
            selected = np.flatnonzero(objective_N == index)
            match objective.example_source:
                case "dialogues":
                    positions[selected] = text_N[selected, None]
                case "pairs":
                    input_positions = np.diff(inputs[selected])[:, 0] + 1 + objective.mode_tokens
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
