"""Worker processes that make the shards of a store.

Each worker is a separate Python process that exchanges JSON lines over its standard input and output. It exits when its
input is closed, so it outlives its parent by at most one unit. Workers are in sessions of their own: Ctrl-C in a
terminal stops the parent, which stops the workers, and they do not all print a traceback.

`concurrent.futures.ProcessPoolExecutor` is not used, for three reasons. With the start method "spawn" it runs the
caller's main script again in every worker, so a user's script that calls `prepare` without a `__main__` guard would
fail. A worker that was killed appears as `BrokenProcessPool`, which gives neither its signal nor its exit code.
Progress needs a queue beside the executor, whose semaphores cause warnings of the resource tracker when the parent is
killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from t5x_like.data.sources.work_units import WorkUnit
from t5x_like.data.store import shards
from t5x_like.data.store.shards import ProgressCallback, ShardJob
from t5x_like.errors import DataError
from t5x_like.faults import STORAGE_FAILED, FaultError
from t5x_like.utils.stall_limit import (
    CLEANUP_SECONDS,
    end_process,
    end_thread,
    set_stall_seconds,
    stall_seconds,
)

_WORKER_CODE = """
import json, sys
sys.path[:] = json.loads(sys.stdin.buffer.readline())
from t5x_like.data.store.worker_pool import run_worker
run_worker()
"""
_PROGRESS_SECONDS = 0.5
"""Minimum time between two progress messages of a worker."""
_POLL_SECONDS = 1.0

Progress = tuple[int, int, int]
"""Arguments of a `ProgressCallback`."""


def make_shards(job: ShardJob, todo: Sequence[tuple[int, WorkUnit]], workers: int, progress: ProgressCallback) -> None:
    """Make the shards of the units `todo` in `workers` processes.

    Args:
      job: Description of the store.
      todo: (index, unit) in the order of the corpus.
      workers: Number of processes.
      progress: Receives the progress of all workers, in the calling thread.

    Raises:
      DataError, OSError: a unit failed. Of several, the first in the order of the corpus is raised, whatever the number
        of workers.
      FaultError: a worker has made no progress for `stall_seconds()`.
    """
    pending: queue.SimpleQueue[tuple[int, WorkUnit]] = queue.SimpleQueue()
    for item in todo:
        pending.put(item)
    messages: queue.SimpleQueue[tuple[int | None, Progress | Exception | None]] = queue.SimpleQueue()
    stop = threading.Event()
    workers_ = [_WorkerProcess(job) for _ in range(min(workers, len(todo)))]
    # One thread per worker waits for its answers. Only the calling thread reports progress. A thread whose process
    # cannot be killed is abandoned.
    threads = [
        threading.Thread(target=_drive, args=(worker, pending, messages, stop), daemon=True) for worker in workers_
    ]
    errors: dict[int, Exception] = {}
    try:
        for thread in threads:
            thread.start()
        running = len(threads)
        while running:
            for worker in workers_:
                worker.require_progress()
            try:
                index, message = messages.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if message is None:
                running -= 1
            elif isinstance(message, Exception):
                errors[index or 0] = message
            else:
                progress(*message)
    finally:
        stop.set()
        for worker in workers_:
            worker.kill()
        for thread in threads:
            if thread.ident is not None:
                end_thread(thread)
    if errors:
        raise errors[min(errors)]


def _drive(
    worker: _WorkerProcess,
    pending: queue.SimpleQueue[tuple[int, WorkUnit]],
    messages: queue.SimpleQueue[tuple[int | None, Progress | Exception | None]],
    stop: threading.Event,
) -> None:
    """Give a worker one unit after another until no unit is left or one has failed; then put a None."""
    with contextlib.suppress(queue.Empty):
        while not stop.is_set():
            index, unit = pending.get_nowait()
            try:
                for progress in worker.make(index, unit):
                    messages.put((None, progress))
            except Exception as error:
                # No further unit is begun after an error; the units in progress are finished, and their shards are
                # kept.
                stop.set()
                messages.put((index, error))
    messages.put((None, None))


class _WorkerProcess:
    """A worker process as its parent sees it."""

    def __init__(self, job: ShardJob):
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER_CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._asked_or_answered: float | None = None
        """Time of the last progress of the unit in progress; None without one."""
        self._is_stalled = False
        with contextlib.suppress(OSError):  # If it has exited already, the first unit raises the error.
            self._send(sys.path)
            self._send(job.to_json())
            self._send(stall_seconds())

    def _send(self, value: Any) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(value).encode() + b"\n")
        self._process.stdin.flush()

    def make(self, index: int, unit: WorkUnit) -> Iterator[Progress]:
        """Let the worker make a shard and yield its progress. Raises the error that occurred in the worker."""
        assert self._process.stdout
        self._asked_or_answered = time.monotonic()
        # A worker that has died cannot read; the end of its output below says how it died.
        with contextlib.suppress(BrokenPipeError):
            self._send([index, unit.to_json()])
        for line in self._process.stdout:
            answer = json.loads(line)
            self._asked_or_answered = time.monotonic() if "progress" in answer else None
            if "progress" in answer:
                yield tuple(answer["progress"])
            elif answer.get("made"):
                return
            else:
                raise _error_of(answer)
        # End of output without an answer: the process has ended.
        self._asked_or_answered = None
        if self._is_stalled:
            raise _stalled()
        code = self._process.wait(CLEANUP_SECONDS)
        cause = f"by signal {-code}, as when memory runs out" if code < 0 else f"with exit code {code}"
        raise DataError(
            f"a worker process ended {cause}; finished shards are kept: run the same command again, possibly with "
            "fewer --workers"
        )

    def require_progress(self) -> None:
        """Kill the process if it makes no progress with its unit, which ends `make`.

        Raises:
          FaultError: the process cannot be killed.
        """
        since = self._asked_or_answered
        if since is None or time.monotonic() - since <= stall_seconds():
            return
        self._is_stalled = True
        if not end_process(self._process):
            raise _stalled()

    def kill(self) -> None:
        if not end_process(self._process):
            return  # To close a pipe would wait for the thread that reads it.
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe:
                    pipe.close()


def _stalled() -> FaultError:
    return FaultError(
        f"a worker process has made no progress for {stall_seconds():g} s, the limit of --stall-timeout; finished "
        "shards are kept: run the same command again",
        STORAGE_FAILED,
    )


def _error_of(answer: dict[str, Any]) -> Exception:
    if "data_error" in answer:
        return DataError(answer["data_error"])
    if "os_error" in answer:
        return OSError(*answer["os_error"])
    return RuntimeError(f"a worker process failed:\n{answer['traceback']}")


def run_worker() -> None:
    """Run a worker: read the job, then units, from standard input, and answer on standard output."""
    # Standard output carries answers only. Output of users' modules is redirected to standard error.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def send(answer: dict[str, Any]) -> None:
        out.write(json.dumps(answer).encode() + b"\n")
        out.flush()

    # The other workers use the other cores: threads of the tokenizers library would wait for each other.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    requests = sys.stdin.buffer
    job = ShardJob.from_json(json.loads(requests.readline()))
    set_stall_seconds(json.loads(requests.readline()))
    tokenizer = None
    try:
        for line in requests:
            index, unit = json.loads(line)
            try:
                tokenizer = tokenizer or job.load_tokenizer()
                with _ProgressSender(send) as progress:
                    shards.make_shard(job, index, WorkUnit.from_json(unit), tokenizer, progress=progress.add)
                send({"made": True})
            except DataError as error:
                send({"data_error": str(error)})
            except OSError as error:
                send({"os_error": [error.errno, str(error.strerror or error)]})
            except Exception:
                send({"traceback": traceback.format_exc()})
    except (BrokenPipeError, KeyboardInterrupt):
        pass  # The parent has exited.
    with contextlib.suppress(OSError):
        out.close()
    os._exit(0)  # Without waiting for threads of the readers.


class _ProgressSender:
    """Sums progress and sends it at most every `_PROGRESS_SECONDS`, and at the end."""

    def __init__(self, send: Callable[[dict[str, Any]], None]):
        self._send = send
        self._sums = [0, 0, 0]
        self._last = time.monotonic()

    def __enter__(self) -> _ProgressSender:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()

    def add(self, documents: int, tokens: int, amount: int) -> None:
        for index, value in enumerate((documents, tokens, amount)):
            self._sums[index] += value
        if time.monotonic() - self._last >= _PROGRESS_SECONDS:
            self._flush()

    def _flush(self) -> None:
        self._send({"progress": self._sums})
        self._sums, self._last = [0, 0, 0], time.monotonic()
