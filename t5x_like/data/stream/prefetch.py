"""Prefetching: one thread that makes batches ahead of the training step.

A second thread would make it slower, since the work is NumPy's, which holds the interpreter lock most of the time.
Small batches are made several at a time, because most of their time is the overhead of calls. The first batch of a run
is made alone, and the number then doubles with each call.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

from t5x_like.data.stream.feature_converters import Features
from t5x_like.data.stream.host_shard import WHOLE, HostShard
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.faults import STORAGE_FAILED, FaultError
from t5x_like.utils.stall_limit import CLEANUP_SECONDS, stall_seconds
from t5x_like.utils.type_aliases import IntArray

_MAX_ROWS_AT_ONCE = 2048
"""Maximum rows of this host that one call makes, unless a single batch has more."""
_MAX_STEPS_AT_ONCE = 16


class Prefetcher(Iterator[dict[str, Features]]):
    """Endless iterator over the batches of a stream after its first `first_row` rows.

    An error while a batch is made is raised by the `next` call that would have returned this batch. `close` stops the
    thread and waits for it, for at most `CLEANUP_SECONDS`: its storage may not answer. The iterator is also a context
    manager.
    """

    def __init__(self, stream: TrainingStream, first_row: int, host_shard: HostShard = WHOLE):
        self._stream = stream
        self._host_shard = host_shard
        self._queue: queue.Queue[tuple[int, dict[str, Features]] | BaseException] = queue.Queue(
            max(stream.data.prefetch_batches, 1)
        )
        self._last_row = first_row  # First row of the last batch that was returned.
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(first_row,), name="prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> dict[str, Features]:
        if self._stop.is_set():
            raise StopIteration
        try:
            result = self._queue.get(timeout=stall_seconds())
        except queue.Empty:
            raise FaultError(
                f"found no batch within {stall_seconds():g} s, expected the next one: the file system of the data does "
                "not answer, or --stall-timeout is too short; a restart resumes",
                STORAGE_FAILED,
            ) from None
        if isinstance(result, BaseException):
            self.close()
            raise result
        self._last_row, batch = result
        return batch

    def last_indices(self) -> dict[str, IntArray]:
        """Return the indices of the rows of the last batch by sub-batch."""
        return self._stream.indices_at(self._last_row, self._host_shard)

    def state_files(self) -> dict[str, bytes]:
        """Return no files: the number of rows that were read determines the following batches."""
        return {}

    def close(self) -> None:
        self._stop.set()
        deadline = time.monotonic() + CLEANUP_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:
            try:  # Free a slot for a thread that waits to put its batch.
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.01)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self, row: int) -> None:
        size, groups = self._stream.batch_size, self._host_shard.groups
        # The first batch is made alone, so that the first step of a run or a restart does not wait for several.
        steps, max_steps = 1, min(max(_MAX_ROWS_AT_ONCE * groups // size, 1), _MAX_STEPS_AT_ONCE)
        try:
            while not self._stop.is_set():
                for number, batch in enumerate(self._batches(row, steps)):
                    self._queue.put((row + number * size, batch))
                    if self._stop.is_set():
                        return
                row += steps * size
                steps = min(2 * steps, max_steps)
        except BaseException as error:  # Passed on to the consumer, whatever it is.
            self._queue.put(error)

    def _batches(self, row: int, steps: int) -> Iterator[dict[str, Features]]:
        try:
            return iter(self._stream.batches_at(row, steps, self._host_shard))
        except Exception:
            # Batches before the failing one must still be delivered, so they are made one at a time.
            rows = range(row, row + steps * self._stream.batch_size, self._stream.batch_size)
            return (self._stream.batches_at(first, 1, self._host_shard)[0] for first in rows)
