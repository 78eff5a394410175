"""Prefetching: threads that make batches ahead of the training step.

Where tokens are in memory or on a local disk, a second thread would make it slower, since the work is NumPy's, which
holds the interpreter lock most of the time. Rows of an object store are waited for, so several threads read ahead. The
batches are functions of their index, and are returned in their order, whatever the number of threads.

Small batches are made several at a time, as a group, because most of their time is the overhead of calls. The first
batch of a run is made alone, and the number then doubles with each group.
"""

from __future__ import annotations

import threading
import time
from collections import deque
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
THREADS_OF_OBJECT_STORES = 4
"""Default number of threads where rows are read from an object store."""

Batch = dict[str, Features]


class _Group:
    """Batches of consecutive steps of one size that one thread makes.

    Attributes:
      batches: (first row, batch) of each step that was made and not returned yet.
      error: The error of the batch after these.
    """

    def __init__(self, row: int, steps: int, size: int) -> None:
        self.row, self.steps, self.size = row, steps, size
        self.batches: deque[tuple[int, Batch]] = deque()
        self.error: BaseException | None = None
        self.is_made = False


class Prefetcher(Iterator[Batch]):
    """Endless iterator over the batches of a stream after its first `first_row` rows, from step `first_step` on.

    An error while a batch is made is raised by the `next` call that would have returned this batch. `close` stops the
    threads and waits for them, for at most `CLEANUP_SECONDS`: their storage may not answer. The iterator is also a
    context manager.
    """

    def __init__(self, stream: TrainingStream, first_row: int, host_shard: HostShard = WHOLE, first_step: int = 0):
        self._stream = stream
        self._host_shard = host_shard
        # First row and size of the last batch that was returned.
        self._last_row, self._last_size = first_row, stream.batch_size
        self._next_row, self._next_step, self._next_steps = first_row, first_step, 1
        self._groups: deque[_Group] = deque()
        """Groups that are made or begun, in the order of their rows."""
        self._ahead = 0
        """Number of batches in these groups."""
        self._changed = threading.Condition()
        self._num_begun = 0
        self._is_stopped = self._has_failed = self._has_made = False
        self._threads = [
            threading.Thread(target=self._work, name="prefetch", daemon=True) for _ in range(_num_threads(stream))
        ]
        for thread in self._threads:
            thread.start()

    def __next__(self) -> Batch:
        with self._changed:
            if self._is_stopped:
                raise StopIteration
            if not self._changed.wait_for(self._is_next_made, timeout=stall_seconds()):
                raise FaultError(
                    f"found no batch within {stall_seconds():g} s, expected the next one: the file system of the data "
                    "does not answer, or --stall-timeout is too short; a restart resumes",
                    STORAGE_FAILED,
                )
            group = self._groups[0]
            if group.batches:
                self._last_row, batch = group.batches.popleft()
                self._last_size = group.size
                self._ahead -= 1
                if not group.batches and group.error is None:
                    self._groups.popleft()
                self._changed.notify_all()
                return batch
        self.close()
        assert group.error is not None
        raise group.error

    def last_indices(self) -> dict[str, IntArray]:
        """Return the indices of the rows of the last batch by sub-batch."""
        return self._stream.indices_at(self._last_row, self._host_shard, self._last_size)

    def state_files(self) -> dict[str, bytes]:
        """Return no files: the number of rows that were read determines the following batches."""
        return {}

    def close(self) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        deadline = time.monotonic() + CLEANUP_SECONDS
        for thread in self._threads:
            thread.join(timeout=max(deadline - time.monotonic(), 0.0))

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        """Make one group after another, until the iterator is closed or a batch cannot be made."""
        while (group := self._begin()) is not None:
            try:
                self._make(group)
            except BaseException as error:  # Passed on to the consumer, whatever it is.
                group.error = error
            with self._changed:
                self._ahead -= group.steps - len(group.batches)
                self._has_failed = self._has_failed or group.error is not None
                group.is_made = self._has_made = True
                self._changed.notify_all()

    def _begin(self) -> _Group | None:
        """Wait until another group is needed, and return it; None if no further one is."""
        groups = self._host_shard.groups
        with self._changed:
            while not (self._is_stopped or self._has_failed or self._is_needed()):
                self._changed.wait(timeout=stall_seconds())
            if self._is_stopped or self._has_failed:
                return None
            size = self._stream.batch_sizes.at(self._next_step)
            max_steps = min(max(_MAX_ROWS_AT_ONCE * groups // size, 1), _MAX_STEPS_AT_ONCE)
            # A group ends where the size of the batches changes.
            alike = self._stream.batch_sizes.steps_alike(self._next_step)
            group = _Group(self._next_row, min(self._next_steps, max_steps, alike or max_steps), size)
            self._groups.append(group)
            self._ahead += group.steps
            self._num_begun += 1
            self._next_row += group.steps * size
            self._next_step += group.steps
            self._next_steps = min(2 * group.steps, max_steps)
            return group

    def _is_next_made(self) -> bool:
        return bool(self._groups) and self._groups[0].is_made

    def _is_needed(self) -> bool:
        if not self._has_made:
            # The first batch is made alone: the first step of a run or a restart does not wait for several, and what is
            # opened at the first use is opened once.
            return self._num_begun == 0
        others = (len(self._threads) - 1) * self._next_steps
        return self._ahead <= self._stream.data.prefetch_batches + others

    def _make(self, group: _Group) -> None:
        rows = range(group.row, group.row + group.steps * group.size, group.size)
        try:
            made = self._stream.batches_at(group.row, group.steps, self._host_shard, group.size)
            group.batches.extend(zip(rows, made, strict=True))
        except Exception:
            # Batches before the failing one must still be delivered, so they are made one at a time.
            for row in rows:
                group.batches.append((row, self._stream.batches_at(row, 1, self._host_shard, group.size)[0]))


def _num_threads(stream: TrainingStream) -> int:
    if stream.data.prefetch_threads is not None:
        return stream.data.prefetch_threads
    waits = any(source.split.is_read_by_requests for source in stream.sources)
    return THREADS_OF_OBJECT_STORES if waits else 1
