"""Training rows by index: batch n is a function of the stores, the configuration and n only.

`mixture_index` maps a row index to its corpus, its objective and its rank among the rows of that pair. `windows` and
`packing` map the rank to text. `denoise` and `feature_converters` turn the text into model features. Each step is
arithmetic on keys, and no state is kept between rows. The number of hosts and the batch size only decide which host
requests which rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, assert_never

import numpy as np
import numpy.typing as npt

from t5x_like.config.batch_sizes import BatchSizes
from t5x_like.config.batch_spec import (
    MAIN,
    RowShape,
    row_shapes,
    sub_batch_of,
    sub_batch_rows_per_block,
    sub_batch_spec,
)
from t5x_like.config.data import CorpusShareConfig, DataConfig
from t5x_like.config.mixture_schedule import row_tokens
from t5x_like.config.objectives import MaskedLM, Objective, Preference
from t5x_like.data.objectives.registry import by_step, denoise, implementation
from t5x_like.data.store.token_store import Store
from t5x_like.data.stream import rng
from t5x_like.data.stream.feature_converters import (
    NO_DENOISER,
    Features,
    RowIds,
    offsets_in_groups,
    put_packed,
    put_rows,
    stack_lengths,
)
from t5x_like.data.stream.host_shard import WHOLE, HostShard
from t5x_like.data.stream.labeled_rows import LabeledRows
from t5x_like.data.stream.mixture_index import MixtureIndex, RowOrigin
from t5x_like.data.stream.packing import PackedRows
from t5x_like.data.stream.phase_planning import CorpusSource, Reader, plan_phases
from t5x_like.data.stream.preference_rows import preference_reader
from t5x_like.data.stream.stored_teacher import StoredTeacher
from t5x_like.data.stream.vocabulary_checks import check_objectives, common_vocabulary
from t5x_like.data.stream.windows import Windows
from t5x_like.utils.digests import json_digest
from t5x_like.utils.type_aliases import IntArray

VERSION = 2
"""Version of the algorithm that makes rows; part of the fingerprint."""

# Uses of the seed. Changing a number changes the data of every seed.
_CORPUS, _PERIOD, _ROW, _STRATUM = range(1, 5)


class TrainingStream:
    """Stream of training rows. It has no position: the batch of any step and host can be requested at any time.

    Args:
      stores: Stores in the order of `data.sources`.
      data: Mixture and shape of the rows.
      batch_size: Rows of a step, over all sub-batches, or those of each step of a run whose batches grow.
      split: Split of the stores to read.

    Raises:
      DataError: a split has less text than one block needs, or the vocabularies of the stores differ.
      ConfigError: an objective does not fit the rows, or may need more sentinels than the vocabulary has.
    """

    def __init__(self, stores: Sequence[Store], data: DataConfig, batch_size: int | BatchSizes, split: str = "train"):
        self.stores = tuple(stores)
        self.data = data
        self.batch_sizes = BatchSizes(batch_size) if isinstance(batch_size, int) else batch_size
        self.batch_size = self.batch_sizes.final
        self.split = split
        self.vocabulary = common_vocabulary(stores)
        self._ids = RowIds.of(self.vocabulary)
        self._traits = self.store.traits_for(data.objectives)
        check_objectives(data, self.vocabulary)
        # The version is part of the key: rows of a changed algorithm have nothing in common with those of the old one.
        self._seed = _seed(data)
        self._row_tokens = [row_tokens(objective, data) for objective in data.objectives]
        self.sources = [self._source(index, share) for index, share in enumerate(data.sources)]
        self.shapes = row_shapes(data)
        self._stratified = any(implementation(objective).stratified for objective in data.objectives)
        # Validation requires that all phases have the same shares of the sub-batches.
        counts = sub_batch_rows_per_block(data)[0]
        # Rows of each sub-batch as a fraction (numerator, denominator) of the rows of a step.
        self._fractions = {name: (counts[name], sum(counts.values())) for name in self.shapes}
        self._phases = plan_phases(self.sources, data, self.batch_sizes, split)
        # Distributions of a teacher, which batches have beside the features of their rows.
        self.stored_teacher: StoredTeacher | None = None
        self._indices = {
            name: MixtureIndex(
                self._phases, self._in_shape(name), self._fractions[name], rng.fold_in(self._key(_PERIOD), index)
            )
            for index, name in enumerate(self.shapes)
        }

    @property
    def store(self) -> Store:
        """The first store, whose tokenizer is that of all stores."""
        return self.stores[0]

    @property
    def fingerprint(self) -> str:
        """Digest of everything that determines the rows. Runs with different fingerprints read different rows."""
        identity = {
            "version": VERSION,
            "stores": [
                (share.name, store.fingerprint) for share, store in zip(self.data.sources, self.stores, strict=True)
            ],
            "split": self.split,
            "objectives": [
                [_described(objective, self.batch_sizes) for objective in source.objectives] for source in self.sources
            ],
            "packed": [
                False if isinstance(source.reader, Windows) else source.reader.identity for source in self.sources
            ],
            "phases": [phase.identity() for phase in self._phases],
            "layout": self.data.layout,
            "lengths": [self.data.inputs_length, self.data.targets_length, *self.data.targets_length_buckets],
            "seed": self.data.seed,
            # Present only if it is set, so that fingerprints of runs from before the option stay valid.
            **({"mask_document_borders": True} if self.data.mask_document_borders else {}),
        }
        return json_digest(identity)[:32]

    def batch(self, step: int, host: int = 0, hosts: int = 1) -> dict[str, Features]:
        """Return the rows of `step` that `host` loads, in a run whose configured batch sizes have not changed."""
        first_row, size = self.batch_sizes.rows_before(step), self.batch_sizes.at(step)
        return self.batches_at(first_row, 1, HostShard(host, hosts), size)[0]

    def batch_at(self, first_row: int, host: int = 0, hosts: int = 1) -> dict[str, Features]:
        """Return the part of a batch of full size that `host` loads, after the first `first_row` rows of the run.

        It is a contiguous part of each sub-batch. The parts of all hosts, concatenated in order, are the global batch,
        whatever the number of hosts.
        """
        return self.batches_at(first_row, 1, HostShard(host, hosts))[0]

    def batches_at(
        self, first_row: int, steps: int, host_shard: HostShard = WHOLE, batch_size: int | None = None
    ) -> list[dict[str, Features]]:
        """Return a host's rows of the batches of `steps` consecutive steps of one size, by sub-batch.

        The batches are made together, which is faster if they are small. `batch_size` None is the full size.
        """
        batches: list[dict[str, Features]] = [{} for _ in range(steps)]
        size = batch_size or self.batch_size
        firsts = range(first_row, first_row + steps * size, size)
        of_steps = [self.indices_at(first, host_shard, size) for first in firsts]
        for name in self._fractions:
            # [steps, N] row indices of all steps, made by one call and divided again.
            index_SxN = np.stack([indices[name] for indices in of_steps])
            features = self.get_rows(index_SxN.ravel(), name)
            if self.stored_teacher is not None:
                features |= self.stored_teacher.features(name, index_SxN.ravel())
            for step, batch in enumerate(batches):
                part = slice(step * index_SxN.shape[1], (step + 1) * index_SxN.shape[1])
                batch[name] = {feature: values[part] for feature, values in features.items()}
        return batches

    def indices_at(
        self, first_row: int, host_shard: HostShard = WHOLE, batch_size: int | None = None
    ) -> dict[str, IntArray]:
        """Return the indices, by sub-batch, of a host's rows of the batch after the first `first_row` rows."""
        size = batch_size or self.batch_size
        return {
            name: self.first_index(name, first_row) + host_shard.rows(size * numerator // denominator)
            for name, (numerator, denominator) in self._fractions.items()
        }

    def first_index(self, sub_batch: str, first_row: int) -> int:
        """Return the index within a sub-batch of its first row after the first `first_row` rows of the run."""
        numerator, denominator = self._fractions[sub_batch]
        return first_row * numerator // denominator

    def sub_batch_of(self, corpus: str, objective: Objective) -> str:
        """Return the name of the sub-batch that contains the rows of a corpus under an objective."""
        source = next(source for source in self.sources if source.name == corpus)
        if not isinstance(source.reader, Windows) or len(self.shapes) == 1:
            return next(iter(self.shapes))
        return sub_batch_of(objective, self.data)

    def get_row(self, index: int, sub_batch: str = MAIN) -> Features:
        """Return the features of one row. The rows of each sub-batch are numbered separately."""
        return self.get_rows(np.array([index], np.int64), sub_batch)

    def get_rows(self, index_N: IntArray, sub_batch: str = MAIN) -> Features:
        """Return the features of N rows of a sub-batch by their indices, from 0 over all epochs. N may be 0."""
        shape, rows = self.shapes[sub_batch], len(index_N)
        spec = sub_batch_spec(self.data, shape, rows)
        # Rows are written into preallocated arrays, in which 0 is padding.
        out: Features = {name: np.zeros(array.shape, array.dtype) for name, array in spec.items()}
        if shape.packed:
            out["denoiser_ids"][:] = NO_DENOISER
        # From here on N rows are processed together, by corpus and objective: NumPy's cost per call exceeds that per
        # row.
        origin = self._indices[sub_batch].locate(index_N)
        # The noise of a row depends on its index only.
        number = list(self.shapes).index(sub_batch)
        keys_N = rng.fold_in(rng.fold_in(self._key(_ROW), number), index_N)
        words_N = rng.stratified(rng.fold_in(self._key(_STRATUM), number), index_N) if self._stratified else None
        step_N = self._steps_of(index_N, sub_batch)
        self._put_windows(out, shape, origin, keys_N, words_N, step_N)
        for index, source in enumerate(self.sources):
            row_n = np.flatnonzero(origin.corpus_N == index)
            # Whole examples have no windows; their rank leads to a row of the plan or to a pair.
            if isinstance(source.reader, PackedRows) and row_n.size:
                rank_n, keys_n, step_n = origin.rank_N[row_n], keys_N[row_n], step_N[row_n]
                self._put_packed(out, source, source.reader, row_n, rank_n, keys_n, step_n)
            elif not isinstance(source.reader, Windows | PackedRows) and row_n.size:
                source.reader.put(out, row_n, source.reader.shuffled_rows(origin.rank_N[row_n]))
                if not shape.packed:
                    out["denoiser_ids"][row_n] = source.objective_ids[0]
        return out

    def _steps_of(self, index_N: IntArray, sub_batch: str) -> IntArray:
        """Return [N]: the step that reads each row of a sub-batch, at these batch sizes."""
        numerator, denominator = self._fractions[sub_batch]
        step_N: IntArray = self.batch_sizes.step_of(index_N * denominator // numerator)
        return step_N

    def corpus_of(self, index_N: IntArray, sub_batch: str = MAIN) -> IntArray:
        """Return [N]: for rows of a sub-batch by their indices, the index of the corpus in `sources`."""
        return self._indices[sub_batch].locate(index_N).corpus_N

    @property
    def rows_per_epoch(self) -> dict[str, int]:
        """Rows of an epoch of each corpus, at the rates of the first phase."""
        return {
            source.name: source.reader.blocks_per_epoch * sum(counts)
            for source, counts in zip(self.sources, self._phases[0].rows_per_block, strict=True)
        }

    def epochs(self, first_row: int) -> dict[str, float]:
        """Return the number of epochs of each corpus after the first `first_row` rows of a run, by name."""
        # The phase that contains the row, and the fractional number of its periods before the row.
        index = max(i for i, phase in enumerate(self._phases) if phase.first_row <= first_row)
        phase = self._phases[index]
        periods = (first_row - phase.first_row) / phase.rows_per_period
        epochs = {}
        for corpus, source in enumerate(self.sources):
            num_blocks = phase.used_blocks[corpus] + periods * phase.blocks_per_period[corpus]
            epochs[source.name] = source.reader.epochs(phase.epoch_spans[corpus], num_blocks)
        return epochs

    def mixture_shares(self) -> list[tuple[str, Objective, float]]:
        """Return (corpus, objective, share of the rows) of the first phase.

        Packed rows count for the first objective of their corpus.
        """
        phase = self._phases[0]
        shares = []
        for source, counts, num_blocks in zip(self.sources, phase.rows_per_block, phase.blocks_per_period, strict=True):
            for objective, count in zip(source.objectives, counts, strict=False):
                shares.append((source.name, objective, count * num_blocks / phase.rows_per_period))
        return shares

    def _key(self, use: int) -> rng.Keys:
        return rng.fold_in(self._seed, use)

    def _source(self, index: int, share: CorpusShareConfig) -> CorpusSource:
        data = self.data
        store = self.stores[index]
        split = store.split(self.split)
        objectives = data.objectives_of(share)
        key = corpus_key(data, index)
        names = [objective.name for objective in data.objectives]
        ids = tuple(names.index(objective.name) for objective in objectives)
        reader: Reader
        match data.examples_of(share):
            case "labelled":
                assert data.labelled is not None
                reader = LabeledRows(store, split, data, data.labelled, key)
            case "preferences":
                assert data.preference is not None
                reader = preference_reader(store, split, data, data.preference, key)
            case "documents":
                reader = PackedRows(split, store.sequences_per_document, data, objectives, key)
            case "windows":
                lengths = tuple(self._row_tokens[number] for number in ids)
                reader = Windows(split.num_tokens, lengths, key)
            case unknown:
                assert_never(unknown)
        return CorpusSource(share.name, split, objectives, ids, reader)

    def _in_shape(self, name: str) -> list[list[bool]]:
        """Return for each corpus and objective whether its rows are in this sub-batch."""
        return [
            [True]
            if not isinstance(source.reader, Windows)
            else [
                len(self.shapes) == 1 or sub_batch_of(objective, self.data) == name for objective in source.objectives
            ]
            for source in self.sources
        ]

    def _put_windows(
        self,
        out: Features,
        shape: RowShape,
        origin: RowOrigin,
        keys_N: rng.Keys,
        words_N: rng.Keys | None,
        step_N: IntArray,
    ) -> None:
        """Read and denoise the rows that are windows. All windows of an objective are denoised by one call."""
        # -1: the row is not a window.
        objective_id_N = np.full(len(keys_N), -1, np.int64)
        start_N = np.empty(len(keys_N), np.int64)
        for index, source in enumerate(self.sources):
            if isinstance(source.reader, Windows):
                for span in range(len(source.reader.epoch_spans)):
                    row_n = np.flatnonzero((origin.corpus_N == index) & (origin.epoch_span_N == span))
                    if row_n.size:
                        objective_n = origin.objective_N[row_n]
                        # From the number among the corpus's objectives to that among all objectives of the data.
                        objective_id_N[row_n] = np.asarray(source.objective_ids)[objective_n]
                        start_N[row_n] = source.reader.starts(span, objective_n, origin.rank_N[row_n])
        # Objectives and not corpora: windows of several corpora under one objective have one length and are denoised by
        # one call.
        of_objectives = (
            (number, *group)
            for number, one in enumerate(self.data.objectives)
            for group in by_step(one, np.flatnonzero(objective_id_N == number), step_N)
        )
        for number, objective, row_n in of_objectives:
            tokens = self._gather(self._row_tokens[number], origin.corpus_N[row_n], start_N[row_n])
            words_n = None if words_N is None else words_N[row_n]
            examples = denoise(tokens, keys_N[row_n], objective, self.vocabulary, self._traits, words_n)
            per_row = objective.windows_per_row
            if per_row == 1:
                borders = self.data.mask_document_borders
                put_rows(out, row_n, examples, self.data.layout, shape, number, self._ids, mask_borders=borders)
                continue
            # Several windows share a row, as segments that follow each other.
            owner_n = np.repeat(np.arange(len(row_n)), per_row)
            lengths = stack_lengths(examples, self.data.layout)
            offsets = {stack: offsets_in_groups(lengths_n, owner_n) for stack, lengths_n in lengths.items()}
            segment_n = np.tile(np.arange(1, per_row + 1), len(row_n))
            put_packed(out, row_n[owner_n], segment_n, offsets, examples, self.data.layout, number, self._ids)

    def _gather(self, length: int, corpus_n: IntArray, start_n: IntArray) -> npt.NDArray[Any]:
        """Return [n, length]: `length` tokens of each corpus from each start."""
        if len(self.sources) == 1:
            return self.sources[0].split.gather(start_n, length)  # In the integer type of the store.
        tokens = np.empty((len(start_n), length), np.int32)
        for corpus in np.unique(corpus_n).tolist():
            in_corpus = corpus_n == corpus
            tokens[in_corpus] = self.sources[corpus].split.gather(start_n[in_corpus], length)
        return tokens

    def _put_packed(
        self,
        out: Features,
        source: CorpusSource,
        reader: PackedRows,
        row_n: IntArray,
        rank_n: IntArray,
        keys_n: rng.Keys,
        step_n: IntArray,
    ) -> None:
        """Read and denoise the examples of packed rows, and write them into rows `row_n` of `out`."""
        packed, owner_m, segment_m = reader.examples_of_rows(reader.shuffled_rows(rank_n))
        # The noise of an example depends on its row and on its number within the row.
        keys_m = rng.fold_in(keys_n[owner_m], segment_m)
        layout = self.data.layout
        groups = [
            (objective_id, indices, examples)
            for index, objective_id in enumerate(source.objective_ids)
            for indices, examples in reader.examples(
                packed, keys_m, index, self.vocabulary, self._traits, step_n[owner_m]
            )
        ]
        # Denoising decides the lengths, so positions in the rows are known only when all groups have been denoised.
        lengths: dict[str, IntArray] = {}
        for _, indices, examples in groups:
            for stack, lengths_n in stack_lengths(examples, layout).items():
                lengths.setdefault(stack, np.zeros(len(owner_m), np.int64))[indices] = lengths_n
        offsets = {stack: offsets_in_groups(lengths_m, owner_m) for stack, lengths_m in lengths.items()}
        for objective_id, indices, examples in groups:
            group_offsets = {stack: offset_m[indices] for stack, offset_m in offsets.items()}
            rows = row_n[owner_m[indices]]
            put_packed(out, rows, segment_m[indices], group_offsets, examples, layout, objective_id, self._ids)


def _described(objective: Objective, batch_sizes: BatchSizes) -> dict[str, Any]:
    """Return the fields of an objective, for fingerprints."""
    fields = dataclasses.asdict(objective)
    if objective.changes_with_steps:
        # The rows of a step follow from them.
        fields["batch_size"] = batch_sizes.final
        if batch_sizes.stages:
            fields["batch_size_ramp"] = batch_sizes.stages
    elif isinstance(objective, MaskedLM):
        del fields["mask_rate_schedule"]
    # Present only if it is set, so that fingerprints of runs from before the option stay valid.
    if isinstance(objective, Preference) and objective.pairs_per_row == 1:
        del fields["pairs_per_row"]
    return fields


def _seed(data: DataConfig) -> rng.Keys:
    return rng.fold_in(data.seed, VERSION)


def corpus_key(data: DataConfig, index: int) -> rng.Keys:
    """Return the key of a corpus of the mixture, from which its order and the draws of objectives are derived."""
    return rng.fold_in(rng.fold_in(_seed(data), _CORPUS), index)
