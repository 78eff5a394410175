"""A stream of rows as a source for Grain, for trainers whose input is Grain's. Needs the extra `grain`.

    steps = map_dataset(StepSource(stream, num_steps=100_000, host=host, hosts=hosts))
    batches = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1)))

An element is a whole step's batch, or a single row. Both are functions of their index, so the state is Grain's own
index. Rows come shuffled and over all epochs already: no `shuffle` and no `repeat`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
from absl import flags

from t5x_like.config.batch import MAIN
from t5x_like.config.data import DataConfig
from t5x_like.data.features import Features
from t5x_like.data.store import Store
from t5x_like.data.stream import Stream


class StepSource:
    """Element n is `stream.batch(n, host, hosts)`: what this host loads of step n.

    This is the fast one: Grain spends some 20 microseconds of Python on each element, whatever its size.
    """

    def __init__(self, stream: Stream, num_steps: int, host: int = 0, hosts: int = 1):
        self._stream = stream
        self._num_steps = num_steps
        self._place = (host, hosts)

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: Any) -> dict[str, Features]:
        _require_index(step, len(self))
        return self._stream.batch(int(step), *self._place)

    def __repr__(self) -> str:
        """The same for the same data, in every process: Grain compares it when a state is restored."""
        host, hosts = self._place
        return f"StepSource({self._stream.fingerprint}, {self._num_steps} of {self._stream.batch_size}, {host}/{hosts})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Worker processes open the stores again; no tokens travel to them."""
        return _reopen_steps, (*_recipe(self._stream), self._num_steps, *self._place)


class RowSource:
    """Element i is row i of a sub-batch, each feature [length] (and `denoiser_ids` a scalar where rows are not packed).

    For Grain's own batching, mixing and sharding, as in `map_dataset(source)[host::hosts].batch(rows)`.
    """

    def __init__(self, stream: Stream, num_rows: int, sub_batch: str = MAIN):
        self._stream = stream
        self._num_rows = num_rows
        self._sub_batch = sub_batch

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: Any) -> Features:
        _require_index(index, len(self))
        return {name: values[0] for name, values in self._stream.row(int(index), self._sub_batch).items()}

    def __iter__(self) -> Iterator[Features]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"RowSource({self._stream.fingerprint}, {self._num_rows} of {self._sub_batch})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen_rows, (*_recipe(self._stream), self._num_rows, self._sub_batch)


def map_dataset(source: StepSource | RowSource) -> grain.MapDataset:
    """Grain's dataset over a source.

    Grain's worker processes read absl's flags, which are parsed only in programs that absl has started
    (google/grain#1355): here they count as parsed.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return grain.MapDataset.source(source)


def _require_index(index: Any, length: int) -> None:
    """Rows and steps are counted from 0; slices are Grain's matter."""
    if not 0 <= int(index) < length:
        raise IndexError(f"found element {index}, expected 0 to {length - 1}")


def _recipe(stream: Stream) -> tuple[Any, DataConfig, int, str]:
    paths = (store.path for store in stream.stores)
    absolute = tuple(path.absolute() if isinstance(path, Path) else path for path in paths)
    return absolute, stream.data, stream.batch_size, stream.split


def _reopen(paths: Sequence[Any], data: DataConfig, batch_size: int, split: str) -> Stream:
    return Stream([Store.open(path) for path in paths], data, batch_size, split)


def _reopen_steps(
    paths: Sequence[Any], data: DataConfig, batch_size: int, split: str, num_steps: int, host: int, hosts: int
) -> StepSource:
    return StepSource(_reopen(paths, data, batch_size, split), num_steps, host, hosts)


def _reopen_rows(
    paths: Sequence[Any], data: DataConfig, batch_size: int, split: str, num_rows: int, sub_batch: str
) -> RowSource:
    return RowSource(_reopen(paths, data, batch_size, split), num_rows, sub_batch)
