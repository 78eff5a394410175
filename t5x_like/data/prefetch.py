"""Batches made ahead of the step by one thread.

One is enough and two would be slower: the work is NumPy's, which holds the interpreter lock most of the time. Small
batches are made several at once, since most of their time is that of calls. The first of a run is made alone, and then
twice as many each time.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

from t5x_like.data.features import Features
from t5x_like.data.share import WHOLE, Share
from t5x_like.data.stream import Stream

_ROWS_AT_ONCE = 2048
"""Rows of this host that are made by one call, if a batch has fewer."""
_STEPS_AT_ONCE = 16


class Prefetcher(Iterator[dict[str, Features]]):
    """An endless iterator over a stream's batches behind its first `first_row` rows.

    What goes wrong while making a batch is raised by the `next` that would have returned it. `close` stops the thread
    and waits for it; the iterator can be used as a context manager.
    """

    def __init__(self, stream: Stream, first_row: int, share: Share = WHOLE):
        self._stream = stream
        self._share = share
        self._queue: queue.Queue[dict[str, Features] | BaseException] = queue.Queue(max(stream.data.prefetch, 1))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(first_row,), name="prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> dict[str, Features]:
        if self._stop.is_set():
            raise StopIteration
        result = self._queue.get()
        if isinstance(result, BaseException):
            self.close()
            raise result
        return result

    def state_files(self) -> dict[str, bytes]:
        """Nothing: the number of rows that were read says where to go on."""
        return {}

    def close(self) -> None:
        self._stop.set()
        while self._thread.is_alive():
            try:  # make room for a thread that waits to put its batch
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.01)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self, row: int) -> None:
        size, groups = self._stream.batch_size, self._share.groups
        steps, most = 1, min(max(_ROWS_AT_ONCE * groups // size, 1), _STEPS_AT_ONCE)
        try:
            while not self._stop.is_set():
                for batch in self._made(row, steps):
                    self._queue.put(batch)
                    if self._stop.is_set():
                        return
                row += steps * size
                steps = min(2 * steps, most)
        except BaseException as error:  # handed over to the consumer, whatever it is
            self._queue.put(error)

    def _made(self, row: int, steps: int) -> Iterator[dict[str, Features]]:
        try:
            return iter(self._stream.batches_at(row, steps, self._share))
        except Exception:
            # Which of the batches it was is found by making them one by one.
            rows = range(row, row + steps * self._stream.batch_size, self._stream.batch_size)
            return (self._stream.batches_at(first, 1, self._share)[0] for first in rows)
