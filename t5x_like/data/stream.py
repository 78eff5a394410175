"""Training rows by index: batch n is a function of the stores, the configuration and n, and of nothing else.

`mixing` finds out of a row's number its corpus, its objective and the how-manieth of these it is; `windows` and
`packing` find its text; `denoise` and `features` make it model features. All of this is arithmetic on keys: nothing is
remembered between rows. The number of hosts and the size of the batches decide only who asks for which rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like.config.batch import MAIN, RowShape, row_shapes, sub_batch_of, sub_batch_slots, sub_batch_spec
from t5x_like.config.data import CorpusShare, DataConfig
from t5x_like.config.errors import ConfigError, DataError, Problem
from t5x_like.config.lengths import raw_window_length, sentinels_needed, windows_per_row
from t5x_like.config.objectives import Objective
from t5x_like.config.rates import Phase, pattern, phases, row_tokens, superblocks
from t5x_like.data import keys as rng
from t5x_like.data.denoise import denoise
from t5x_like.data.features import NO_DENOISER, Features, offsets_in_groups, put_packed, put_rows, stack_lengths
from t5x_like.data.labelled import LabelledRows
from t5x_like.data.mixing import Integers, Mixing, PhaseSlots, Places, periods_in
from t5x_like.data.packing import Packed
from t5x_like.data.sampling import corpus_rates
from t5x_like.data.share import WHOLE, Share
from t5x_like.data.store import Split, Store
from t5x_like.data.windows import Windows

VERSION = 2
"""Of the law that makes rows; part of the fingerprint."""
_LEAST_PERIODS = 20
"""Of a phase that ends, unless it is short."""

# Uses of the seed. The numbers are part of what a seed means.
_CORPUS, _PERIOD, _ROW = range(1, 4)


@dataclasses.dataclass(frozen=True)
class Source:
    """A corpus of the mixture, ready to be read.

    Attributes:
      objectives, ids: Its objectives, and their indices in `data.objectives`.
      reader: Of windows, of packed documents, or of labelled examples.
    """

    name: str
    split: Split
    objectives: tuple[Objective, ...]
    ids: tuple[int, ...]
    reader: Windows | Packed | LabelledRows

    def pattern(self, data: DataConfig, phase: Phase) -> tuple[int, ...]:
        """Rows of each kind in a superblock. Rows of whole examples are of one kind, and one is a superblock."""
        if not isinstance(self.reader, Windows):
            return (1,)
        return pattern(self.objectives, data, phase.objectives)


class Stream:
    """Batches of training rows. Holds no position: any step of any host can be asked for at any time.

    Args:
      stores: In the order of `data.sources`.
      data: The mixture and the shape of rows.
      batch_size: Rows of a step, over all sub-batches.
      split: The stores' split to read.

    Raises:
      DataError: a split has less text than one superblock needs, or the stores' vocabularies differ.
      ConfigError: an objective does not fit the rows, or can need more sentinels than the vocabulary has.
    """

    def __init__(self, stores: Sequence[Store], data: DataConfig, batch_size: int, split: str = "train"):
        self.stores = tuple(stores)
        self.data = data
        self.batch_size = batch_size
        self.split = split
        self.vocabulary = _common_vocabulary(stores)
        self._traits = self.store.traits_for(data.objectives)
        _check_objectives(data, self.vocabulary.num_sentinels)
        self._seed = rng.fold_in(data.seed, VERSION)
        self._row_tokens = [row_tokens(objective, data) for objective in data.objectives]
        self.sources = [self._source(index, share) for index, share in enumerate(data.sources)]
        self.shapes = row_shapes(data)
        counts = sub_batch_slots(data)[0]
        self._shares = {name: (counts[name], sum(counts.values())) for name in self.shapes}
        self._phases = self._make_phases()
        self._mixings = {
            name: Mixing(self._phases, self._in_shape(name), self._shares[name], rng.fold_in(self._key(_PERIOD), index))
            for index, name in enumerate(self.shapes)
        }

    @property
    def store(self) -> Store:
        """The first store; its tokenizer is that of all."""
        return self.stores[0]

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides which row is where: runs that differ in it read different rows."""
        document = {
            "version": VERSION,
            "stores": [
                (share.name, store.fingerprint) for share, store in zip(self.data.sources, self.stores, strict=True)
            ],
            "split": self.split,
            "objectives": [
                [dataclasses.asdict(objective) for objective in source.objectives] for source in self.sources
            ],
            "packed": [isinstance(source.reader, Packed) for source in self.sources],
            "phases": [dataclasses.asdict(phase) for phase in self._phases],
            "layout": self.data.layout,
            "lengths": [self.data.inputs_length, self.data.targets_length, *self.data.short_targets_lengths],
            "seed": self.data.seed,
        }
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:32]

    def batch(self, step: int, host: int = 0, hosts: int = 1) -> dict[str, Features]:
        """The rows of `step` that `host` loads, of a run that has had this batch size from its first step on."""
        return self.batch_at(step * self.batch_size, host, hosts)

    def batch_at(self, first_row: int, host: int = 0, hosts: int = 1) -> dict[str, Features]:
        """The batch behind the first `first_row` rows of the run, as far as `host` loads it: of each sub-batch a
        contiguous part, in order.

        Concatenated over the hosts they are the global batch, whatever the number of hosts.
        """
        return self.batches_at(first_row, 1, Share(host, hosts))[0]

    def batches_at(self, first_row: int, steps: int, share: Share = WHOLE) -> list[dict[str, Features]]:
        """The batches of so many steps, as far as they are of a share, one after the other. Made together, which takes
        less time for small batches."""
        batches: list[dict[str, Features]] = [{} for _ in range(steps)]
        for name, (mine, all_) in self._shares.items():
            rows = self.batch_size * mine // all_
            own_N = share.rows(rows)
            firsts = [self.first_of(name, first_row + step * self.batch_size) for step in range(steps)]
            made = self.rows((np.array(firsts, np.int64)[:, None] + own_N).ravel(), name)
            for step, batch in enumerate(batches):
                part = slice(step * len(own_N), (step + 1) * len(own_N))
                batch[name] = {feature: values[part] for feature, values in made.items()}
        return batches

    def first_of(self, sub_batch: str, first_row: int) -> int:
        """The sub-batch's own number of its first row behind the first `first_row` rows of the run."""
        mine, all_ = self._shares[sub_batch]
        return first_row * mine // all_

    def sub_batch_of(self, corpus: str, objective: Objective) -> str:
        """Name of the sub-batch that a corpus's rows of an objective are in."""
        source = next(source for source in self.sources if source.name == corpus)
        if not isinstance(source.reader, Windows) or len(self.shapes) == 1:
            return next(iter(self.shapes))
        return sub_batch_of(objective, self.data)

    def row(self, index: int, sub_batch: str = MAIN) -> Features:
        """A row as features of one row; rows of each sub-batch are numbered for themselves."""
        return self.rows(np.array([index], np.int64), sub_batch)

    def rows(self, index_N: Integers, sub_batch: str = MAIN) -> Features:
        """Features of rows of a sub-batch by their numbers, from 0 over all epochs; N may be 0."""
        shape, rows = self.shapes[sub_batch], len(index_N)
        spec = sub_batch_spec(self.data, shape, rows)
        out: Features = {name: np.zeros(array.shape, array.dtype) for name, array in spec.items()}
        if shape.packed:
            out["denoiser_ids"][:] = NO_DENOISER
        places = self._mixings[sub_batch].places(index_N)
        keys_N = rng.fold_in(rng.fold_in(self._key(_ROW), list(self.shapes).index(sub_batch)), index_N)
        self._put_windows(out, shape, places, keys_N)
        for index, source in enumerate(self.sources):
            mine = np.flatnonzero(places.corpus_N == index)
            if isinstance(source.reader, Packed) and mine.size:
                self._put_packed(out, source, source.reader, mine, places.number_N[mine], keys_N[mine])
            elif isinstance(source.reader, LabelledRows) and mine.size:
                source.reader.put(out, mine, source.reader.visited(places.number_N[mine]))
                out["denoiser_ids"][mine] = source.ids[0]
        return out

    def corpora(self, index_N: Integers, sub_batch: str = MAIN) -> Integers:
        """[N]: which of `sources` rows of a sub-batch are of, by their numbers."""
        return self._mixings[sub_batch].places(index_N).corpus_N

    @property
    def rows_per_epoch(self) -> dict[str, int]:
        """Rows of each corpus that make a pass over it, at the rates of the first phase."""
        found = {}
        for source, counts in zip(self.sources, self._phases[0].patterns, strict=True):
            found[source.name] = source.reader.superblocks_per_epoch * sum(counts)
        return found

    def epochs(self, first_row: int) -> dict[str, float]:
        """Passes over each corpus that the first so many rows of a run make, by name."""
        index = max(i for i, phase in enumerate(self._phases) if phase.first_row <= first_row)
        phase = self._phases[index]
        periods = (first_row - phase.first_row) / phase.rows
        found = {}
        for corpus, source in enumerate(self.sources):
            superblocks = phase.used[corpus] + periods * phase.superblocks[corpus]
            found[source.name] = source.reader.epochs(phase.stretches[corpus], superblocks)
        return found

    def shares(self) -> list[tuple[str, Objective, float]]:
        """(corpus, objective, share of the rows) of the first phase. Packed rows count as of the corpus's first
        objective."""
        phase = self._phases[0]
        found = []
        for source, counts, number in zip(self.sources, phase.patterns, phase.superblocks, strict=True):
            for objective, count in zip(source.objectives, counts, strict=False):
                found.append((source.name, objective, count * number / phase.rows))
        return found

    def _key(self, use: int) -> rng.Keys:
        return rng.fold_in(self._seed, use)

    def _source(self, index: int, share: CorpusShare) -> Source:
        data = self.data
        store = self.stores[index]
        split = store.split(self.split)
        objectives = data.objectives_of(share)
        key = rng.fold_in(self._key(_CORPUS), index)
        names = [objective.name for objective in data.objectives]
        ids = tuple(names.index(objective.name) for objective in objectives)
        reader: Windows | Packed | LabelledRows
        if data.labelled is not None:
            reader = LabelledRows(store, split, data, data.labelled, key)
        elif data.examples_of(share) == "documents":
            reader = Packed(split, store.parts, data, objectives, key)
        else:
            lengths = tuple(self._row_tokens[number] for number in ids)
            reader = Windows(split.num_tokens, lengths, key)
        return Source(share.name, split, objectives, ids, reader)

    def _make_phases(self) -> list[PhaseSlots]:
        """The slots of each phase, and where in its text each corpus is when the phase begins."""
        changes = phases(self.data)
        sizes = [source.split.num_tokens for source in self.sources]
        used = [0] * len(self.sources)
        stretches = [-1] * len(self.sources)
        known: list[tuple[int, ...] | None] = [None] * len(self.sources)
        made: list[PhaseSlots] = []
        for index, change in enumerate(changes):
            patterns = [source.pattern(self.data, change) for source in self.sources]
            for corpus, source in enumerate(self.sources):
                if not isinstance(source.reader, Windows):
                    stretches[corpus] = 0
                elif patterns[corpus] != known[corpus]:
                    stretches[corpus] = self._begin_stretch(source, source.reader, patterns[corpus], used[corpus])
                    used[corpus] = 0
                known[corpus] = patterns[corpus]
            rates = corpus_rates(self.data.sampling, change.corpora, dict(zip(change.corpora, sizes, strict=True)))
            per_superblock = [rate / sum(counts) for rate, counts in zip(rates, patterns, strict=True)]
            first_row = change.start_step * self.batch_size
            rows = changes[index + 1].start_step * self.batch_size - first_row if index + 1 < len(changes) else None
            most = None if rows is None else rows // (_LEAST_PERIODS * max(map(sum, patterns)))
            numbers = superblocks(per_superblock, most)
            phase = PhaseSlots(first_row, tuple(patterns), numbers, tuple(stretches), tuple(used))
            made.append(phase)
            if rows is not None:
                periods = periods_in(rows, phase.rows)
                used = [before + periods * number for before, number in zip(used, numbers, strict=True)]
        return made

    def _begin_stretch(self, source: Source, windows: Windows, counts: tuple[int, ...], used: int) -> int:
        needed, tokens = windows.superblock(counts), source.split.num_tokens
        if tokens < needed:
            raise DataError(
                f"corpus {source.name}: found {tokens:,} {self.split} tokens, expected at least {needed:,}, one window "
                f"for each of the mixture's {sum(counts)} shares; bring more text or shorter rows"
            )
        epoch, offset = windows.end_stretch(used) if windows.stretches else (0, 0)
        return windows.add_stretch(counts, epoch, offset)

    def _in_shape(self, name: str) -> list[list[bool]]:
        """By corpus and objective: whether its rows are in this sub-batch."""
        return [
            [True]
            if not isinstance(source.reader, Windows)
            else [
                len(self.shapes) == 1 or sub_batch_of(objective, self.data) == name for objective in source.objectives
            ]
            for source in self.sources
        ]

    def _put_windows(self, out: Features, shape: RowShape, places: Places, keys_N: rng.Keys) -> None:
        """Reads the windows and denoises them, all windows of an objective at once, whatever their corpora."""
        id_N = np.full(len(keys_N), -1, np.int64)
        start_N = np.empty(len(keys_N), np.int64)
        for index, source in enumerate(self.sources):
            if isinstance(source.reader, Windows):
                for stretch in range(len(source.reader.stretches)):
                    mine = np.flatnonzero((places.corpus_N == index) & (places.stretch_N == stretch))
                    if mine.size:
                        objective_n = places.objective_N[mine]
                        id_N[mine] = np.asarray(source.ids)[objective_n]
                        start_N[mine] = source.reader.starts(stretch, objective_n, places.number_N[mine])
        for number, objective in enumerate(self.data.objectives):
            row_n = np.flatnonzero(id_N == number)
            if not row_n.size:
                continue
            tokens = self._gather(self._row_tokens[number], places.corpus_N[row_n], start_N[row_n])
            examples = denoise(tokens, keys_N[row_n], objective, self.vocabulary, self._traits)
            together = windows_per_row(objective)
            if together == 1:
                put_rows(out, row_n, examples, self.data.layout, shape, number)
                continue
            owner_n = np.repeat(np.arange(len(row_n)), together)
            lengths = stack_lengths(examples, self.data.layout)
            offsets = {stack: offsets_in_groups(lengths_n, owner_n) for stack, lengths_n in lengths.items()}
            segment_n = np.tile(np.arange(1, together + 1), len(row_n))
            put_packed(out, row_n[owner_n], segment_n, offsets, examples, self.data.layout, number)

    def _gather(self, length: int, corpus_n: Integers, start_n: Integers) -> npt.NDArray[Any]:
        """[n, length]: text from these places of these corpora."""
        if len(self.sources) == 1:
            return self.sources[0].split.gather(start_n, length)
        tokens = np.empty((len(start_n), length), np.int32)
        for corpus in np.unique(corpus_n).tolist():
            here = corpus_n == corpus
            tokens[here] = self.sources[corpus].split.gather(start_n[here], length)
        return tokens

    def _put_packed(
        self, out: Features, source: Source, packed: Packed, row_n: Integers, number_n: Integers, keys_n: rng.Keys
    ) -> None:
        piece, owner_m = packed.pieces(packed.visited(number_n))
        keys_m = rng.fold_in(keys_n[owner_m], piece.segment_N)
        layout = self.data.layout
        made = [
            (number, some, examples)
            for index, number in enumerate(source.ids)
            for some, examples in packed.examples(piece, keys_m, index, self.vocabulary, self._traits)
        ]
        lengths: dict[str, Integers] = {}
        for _, some, examples in made:
            for stack, lengths_n in stack_lengths(examples, layout).items():
                lengths.setdefault(stack, np.zeros(len(owner_m), np.int64))[some] = lengths_n
        offsets = {stack: offsets_in_groups(lengths_m, owner_m) for stack, lengths_m in lengths.items()}
        for number, some, examples in made:
            here = {stack: offset_m[some] for stack, offset_m in offsets.items()}
            put_packed(out, row_n[owner_m[some]], piece.segment_N[some], here, examples, layout, number)


def _common_vocabulary(stores: Sequence[Store]) -> Any:
    """The vocabulary of all stores.

    Raises:
      DataError: they have different tokenizers, so that one id would mean different text.
    """
    first = stores[0]
    for store in stores[1:]:
        mine, theirs = store.info["tokenizer_fingerprint"], first.info["tokenizer_fingerprint"]
        if (mine, store.vocabulary) != (theirs, first.vocabulary):
            raise DataError(
                f"{store.path}: found a store made by the tokenizer {mine} with {store.vocabulary.vocab_size:,} ids, "
                f"expected {theirs} with {first.vocabulary.vocab_size:,}, as {first.path}; prepare both with one"
            )
    return first.vocabulary


def _check_objectives(data: DataConfig, num_sentinels: int) -> None:
    """Raises ConfigError where a window is empty, or its spans can outnumber the vocabulary's sentinels."""
    problems = []
    for objective in data.objectives:
        shape = (data.layout, data.inputs_length, data.targets_length)
        needed = sentinels_needed(objective, *shape)
        where = f"data.mixture ({objective.name})"
        if raw_window_length(objective, *shape) < 1:
            problems.append(Problem(where, "rows too short for two tokens", "longer inputs_length and targets_length"))
        if needed > num_sentinels:
            problems.append(Problem(where, f"up to {needed} spans", f"at most {num_sentinels}, one per sentinel"))
    if problems:
        raise ConfigError(problems)
