"""Training rows by index: batch n is a function of the store, the configuration and n, and of nothing else.

An epoch cuts the split into superblocks: stretches of text that hold the same number of windows of each objective, in
proportion to the rates, in an order of their own. So each token is in exactly one window per epoch, under one
denoiser, although the denoisers' windows differ in length; the text that does not fill a last superblock is left out,
and since every epoch starts its first superblock at another place, it is not the same text each time. Rows visit the
windows in a pseudo-random permutation. All of this is arithmetic on keys: nothing is remembered between rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like.config.data import DataConfig
from t5x_like.config.errors import ConfigError, DataError, Problem
from t5x_like.config.lengths import raw_window_length, sentinels_needed
from t5x_like.data import keys as rng
from t5x_like.data.denoise import denoise
from t5x_like.data.features import Features, convert
from t5x_like.data.store import Store

VERSION = 1
"""Of the law that makes rows; part of the fingerprint."""
_MOST_SLOTS = 100

# Uses of the seed. The numbers are part of what a seed means.
_PHASE, _SHUFFLE, _ORDER, _ROW = range(1, 5)


def slots_per_superblock(rates: tuple[float, ...]) -> tuple[int, ...]:
    """Windows of each objective in a superblock: exactly in proportion to the rates if at most 100 windows can be, or
    else the nearest with 100 (largest remainders), at least one each."""
    total = sum(rates)
    shares = [rate / total for rate in rates]
    for size in range(1, _MOST_SLOTS + 1):
        counts = [round(share * size) for share in shares]
        if all(abs(share * size - count) < 1e-9 and count for share, count in zip(shares, counts, strict=True)):
            return tuple(counts)
    counts = [max(int(share * _MOST_SLOTS), 1) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - shares[index] * _MOST_SLOTS)
    for index in by_remainder[: max(_MOST_SLOTS - sum(counts), 0)]:
        counts[index] += 1
    return tuple(counts)


@dataclasses.dataclass(frozen=True)
class Windows:
    """Where some rows' text is: objective, first token and key of each. `length` is a function of the objective."""

    denoiser_N: npt.NDArray[np.int64]
    start_N: npt.NDArray[np.int64]
    key_N: rng.Keys


class Stream:
    """Batches of training rows. Holds no position: any step of any host can be asked for at any time.

    Raises:
      DataError: the split has less text than one superblock needs.
      ConfigError: an objective does not fit the rows, or can need more sentinels than the vocabulary has.
    """

    def __init__(self, store: Store, data: DataConfig, batch_size: int, split: str = "train"):
        self.store = store
        self.data = data
        self.batch_size = batch_size
        self._split = store.split(split)
        self.window_lengths = window_lengths(data, store.vocabulary.num_sentinels)
        """Raw tokens per window, by objective."""
        self.slots = slots_per_superblock(tuple(objective.rate for objective in data.mixture))
        """Windows of each objective in a superblock: the mixture by example."""
        self._slots = np.repeat(np.arange(len(self.slots)), self.slots)
        self._superblock = int(np.dot(self.slots, self.window_lengths))
        tokens = self._split.num_tokens
        self._superblocks = tokens // self._superblock
        if not self._superblocks:
            raise DataError(
                f"{store.path}: found {tokens:,} {split} tokens, expected at least {self._superblock:,}, "
                f"one window for each of the mixture's {len(self._slots)} shares; bring more text or shorter rows"
            )

    @property
    def rows_per_epoch(self) -> int:
        return self._superblocks * len(self._slots)

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides which row is where: runs that differ in it read different batches."""
        document = {
            "version": VERSION,
            "store": self.store.fingerprint,
            "split": self._split.name,
            "mixture": [dataclasses.asdict(objective) for objective in self.data.mixture],
            "layout": self.data.layout,
            "lengths": [self.data.inputs_length, self.data.targets_length],
            "seed": self.data.seed,
            "batch_size": self.batch_size,
        }
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:32]

    def batch(self, step: int, host: int = 0, hosts: int = 1) -> dict[str, Features]:
        """The rows of `step` that `host` loads: a contiguous part of the global batch, in order.

        Concatenated over the hosts they are the global batch, whatever the number of hosts.
        """
        first = step * self.batch_size
        start, stop = first + self.batch_size * host // hosts, first + self.batch_size * (host + 1) // hosts
        return {"main": self.rows(np.arange(start, stop, dtype=np.int64))}

    def row(self, index: int) -> Features:
        """Row `index` of the whole run, as features of one row."""
        return self.rows(np.array([index], np.int64))

    def rows(self, index_N: npt.NDArray[np.int64]) -> Features:
        """Features of the rows with these indices, which count from 0 over all epochs; N may be 0."""
        if not index_N.size:
            return {name: values[:0] for name, values in self.row(0).items()}
        windows = self.windows(index_N)
        return make_features(self.store, self._split.name, self.data, self.window_lengths, windows)

    def windows(self, index_N: npt.NDArray[np.int64]) -> Windows:
        """Where the text of these rows is."""
        seed = rng.fold_in(self.data.seed, VERSION)
        rows, slots = self.rows_per_epoch, len(self._slots)
        epoch_N, row_N = np.divmod(index_N, rows)
        epoch_key_N = rng.fold_in(seed, epoch_N)
        place_N = rng.permute(row_N, rows, rng.fold_in(epoch_key_N, _SHUFFLE))
        superblock_N, slot_N = np.divmod(place_N, slots)

        # The order of the objectives inside each superblock, and the length of all windows before the slot.
        order_key_N = rng.fold_in(rng.fold_in(epoch_key_N, _ORDER), superblock_N)
        order_NxS = self._slots[np.argsort(rng.bits(order_key_N, 0, slots), axis=1)]
        lengths_NxS = np.asarray(self.window_lengths)[order_NxS]
        before_N = np.where(np.arange(slots) < slot_N[:, None], lengths_NxS, 0).sum(axis=1)
        denoiser_N = order_NxS[np.arange(len(index_N)), slot_N]

        tokens = self._split.num_tokens
        phase_N = rng.below(rng.fold_in(epoch_key_N, _PHASE), tokens)
        start_N = (phase_N + superblock_N * self._superblock + before_N) % tokens
        return Windows(denoiser_N, start_N, rng.fold_in(rng.fold_in(seed, _ROW), index_N))


def window_lengths(data: DataConfig, num_sentinels: int) -> tuple[int, ...]:
    """Raw tokens per window of each objective of the mixture.

    Raises:
      ConfigError: a window is empty, or its spans can outnumber the sentinels.
    """
    problems = []
    lengths = []
    for index, objective in enumerate(data.mixture):
        shape = (data.layout, data.inputs_length, data.targets_length)
        length = raw_window_length(objective, *shape)
        needed = sentinels_needed(objective, *shape)
        lengths.append(length)
        where = f"data.mixture.{index} ({objective.name})"
        if length < 1:
            problems.append(Problem(where, "rows too short for two tokens", "longer inputs_length and targets_length"))
        if needed > num_sentinels:
            problems.append(Problem(where, f"up to {needed} spans", f"at most {num_sentinels}, one per sentinel"))
    if problems:
        raise ConfigError(problems)
    return tuple(lengths)


def make_features(
    store: Store, split: str, data: DataConfig, lengths: tuple[int, ...], windows: Windows
) -> dict[str, npt.NDArray[Any]]:
    """Reads the windows and denoises them, all windows of an objective at once; rows keep their order."""
    rows = len(windows.denoiser_N)
    features: Features = {}
    for index, objective in enumerate(data.mixture):
        row_n = np.flatnonzero(windows.denoiser_N == index)
        if not row_n.size:
            continue
        tokens_nxL = store.split(split).gather(windows.start_N[row_n], lengths[index])
        examples = denoise(tokens_nxL, windows.key_N[row_n], objective, store.vocabulary)
        part = convert(examples, data.layout, data.inputs_length, data.targets_length)
        for name, values in part.items():
            if name not in features:
                features[name] = np.zeros((rows, values.shape[1]), np.int32)
            features[name][row_n] = values
    return {**features, "denoiser_ids": windows.denoiser_N.astype(np.int32)}
