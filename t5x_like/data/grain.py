"""Random-access sources of Grain over a training stream, for trainers that read Grain. Needs the extra `grain`.

    steps = map_dataset(StepSource(stream, num_steps=100_000, host=host, hosts=hosts))
    batches = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1)))

An element is the batch of a step, or a single row. Both are functions of their index, so the state is Grain's index.
Rows are already shuffled and continue over all epochs, so `shuffle` and `repeat` are not needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
from absl import flags

from t5x_like.config.batch_sizes import BatchSizes
from t5x_like.config.batch_spec import MAIN
from t5x_like.config.data import DataConfig
from t5x_like.data.store.token_arrays import ReadOptions
from t5x_like.data.store.token_store import Store
from t5x_like.data.stream.feature_converters import Features
from t5x_like.data.stream.row_stream import TrainingStream


class StepSource:
    """Source whose element n is `stream.batch(n, host, hosts)`, the rows of step n that this host loads.

    It is faster than `RowSource`, because Grain spends about 20 microseconds on each element, whatever its size.
    """

    def __init__(self, stream: TrainingStream, num_steps: int, host: int = 0, hosts: int = 1):
        self._stream = stream
        self._num_steps = num_steps
        self._host, self._hosts = host, hosts

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: Any) -> dict[str, Features]:
        _require_index(step, len(self))
        return self._stream.batch(int(step), self._host, self._hosts)

    def __repr__(self) -> str:
        """Return a text that is equal for equal data in every process. Grain compares it when it restores a state."""
        shard = f"{self._host}/{self._hosts}"
        return f"StepSource({self._stream.fingerprint}, {self._num_steps} of {self._stream.batch_size}, {shard})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the locations of the stores: worker processes open them again, and no tokens are sent."""
        return _reopen_steps, (*_stream_arguments(self._stream), self._num_steps, self._host, self._hosts)


class RowSource:
    """Source whose element i is row i of a sub-batch: features [length], and a scalar `denoiser_ids` without packing.

    It is meant for Grain's own batching, mixing and sharding, as in `map_dataset(source)[host::hosts].batch(rows)`.
    """

    def __init__(self, stream: TrainingStream, num_rows: int, sub_batch: str = MAIN):
        self._stream = stream
        self._num_rows = num_rows
        self._sub_batch = sub_batch

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: Any) -> Features:
        _require_index(index, len(self))
        return {name: values[0] for name, values in self._stream.get_row(int(index), self._sub_batch).items()}

    def __iter__(self) -> Iterator[Features]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"RowSource({self._stream.fingerprint}, {self._num_rows} of {self._sub_batch})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen_rows, (*_stream_arguments(self._stream), self._num_rows, self._sub_batch)


def map_dataset(source: StepSource | RowSource) -> grain.MapDataset:
    """Return Grain's dataset over a source.

    Grain's worker processes read the flags of absl, which are parsed only in programs that absl starts
    (google/grain#1355). This function marks them as parsed.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return grain.MapDataset.source(source)


def _require_index(index: Any, length: int) -> None:
    """Raise IndexError for an index outside [0, length). Slices are handled by Grain."""
    if not 0 <= int(index) < length:
        raise IndexError(f"found element {index}, expected 0 to {length - 1}")


def _stream_arguments(stream: TrainingStream) -> tuple[Any, DataConfig, BatchSizes, str]:
    paths = (store.path for store in stream.stores)
    absolute = tuple(path.absolute() if isinstance(path, Path) else path for path in paths)
    return absolute, stream.data, stream.batch_sizes, stream.split


def _reopen(paths: Sequence[Any], data: DataConfig, batch_size: BatchSizes, split: str) -> TrainingStream:
    return TrainingStream([Store.open(path, ReadOptions.of(data)) for path in paths], data, batch_size, split)


def _reopen_steps(
    paths: Sequence[Any], data: DataConfig, batch_size: BatchSizes, split: str, num_steps: int, host: int, hosts: int
) -> StepSource:
    return StepSource(_reopen(paths, data, batch_size, split), num_steps, host, hosts)


def _reopen_rows(
    paths: Sequence[Any], data: DataConfig, batch_size: BatchSizes, split: str, num_rows: int, sub_batch: str
) -> RowSource:
    return RowSource(_reopen(paths, data, batch_size, split), num_rows, sub_batch)
