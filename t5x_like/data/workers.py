"""Helper processes that make the parts of a store.

Each is a Python of its own that talks in JSON lines over its standard input and output, and leaves when the input ends:
it cannot outlive its parent by more than a unit. They are in a session of their own, so that Ctrl-C on a terminal ends
the parent, which ends them, and not all at once with a traceback each.
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

from t5x_like.config.errors import DataError
from t5x_like.data import parts
from t5x_like.data.parts import Job
from t5x_like.data.units import Unit

_START = """
import json, sys
sys.path[:] = json.loads(sys.stdin.buffer.readline())
from t5x_like.data.workers import serve
serve()
"""
_TELL_SECONDS = 0.5

Told = Callable[[int, int, int], None]


def make_parts(job: Job, todo: Sequence[tuple[int, Unit]], workers: int, told: Told) -> None:
    """Makes the parts of the units `todo` by `workers` processes.

    Args:
      job: Of the store.
      todo: (index, unit) in the order of the corpus.
      workers: Number of processes.
      told: Gets documents, tokens and how much was read since the last call.

    Raises:
      DataError, OSError: of the first unit in the order of the corpus that has one, whatever the number of workers.
    """
    waiting: queue.SimpleQueue[tuple[int, Unit]] = queue.SimpleQueue()
    for item in todo:
        waiting.put(item)
    answers: queue.SimpleQueue[tuple[int | None, Any]] = queue.SimpleQueue()
    stop = threading.Event()
    helpers = [_Helper(job) for _ in range(min(workers, len(todo)))]
    threads = [threading.Thread(target=_drive, args=(helper, waiting, answers, stop)) for helper in helpers]
    failed: dict[int, Exception] = {}
    try:
        for thread in threads:
            thread.start()
        running = len(threads)
        while running:
            index, answer = answers.get()
            if answer is None:
                running -= 1
            elif isinstance(answer, Exception):
                failed[index or 0] = answer
            else:
                told(*answer)
    finally:
        stop.set()
        for helper in helpers:
            helper.end()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if failed:
        raise failed[min(failed)]


def _drive(
    helper: _Helper,
    waiting: queue.SimpleQueue[tuple[int, Unit]],
    answers: queue.SimpleQueue[tuple[int | None, Any]],
    stop: threading.Event,
) -> None:
    """Gives a helper one unit after another until none is left or one has failed."""
    with contextlib.suppress(queue.Empty):
        while not stop.is_set():
            index, unit = waiting.get_nowait()
            try:
                for progress in helper.make(index, unit):
                    answers.put((None, progress))
            except Exception as error:
                stop.set()
                answers.put((index, error))
    answers.put((None, None))


class _Helper:
    def __init__(self, job: Job):
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        with contextlib.suppress(OSError):  # it died at once: the first unit will tell
            self._send(sys.path)
            self._send(job.to_json())

    def _send(self, value: Any) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(value).encode() + b"\n")
        self._process.stdin.flush()

    def make(self, index: int, unit: Unit) -> Iterator[tuple[int, int, int]]:
        """Has it make a part; yields its progress. Raises what the part raised there."""
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._send([index, unit.to_json()])
        for line in self._process.stdout:
            answer = json.loads(line)
            if "progress" in answer:
                yield tuple(answer["progress"])
            elif answer.get("made"):
                return
            else:
                raise _as_error(answer)
        code = self._process.wait()
        why = f"by signal {-code}, as when memory runs out" if code < 0 else f"with exit code {code}"
        raise DataError(
            f"a worker process ended {why}; finished parts are kept: call it again, perhaps with fewer --workers"
        )

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe:
                    pipe.close()


def _as_error(answer: dict[str, Any]) -> Exception:
    if "data_error" in answer:
        return DataError(answer["data_error"])
    if "os_error" in answer:
        return OSError(*answer["os_error"])
    return RuntimeError(f"a worker process failed:\n{answer['traceback']}")


def serve() -> None:
    """What a helper does: a job, then units, from standard input; answers to what was standard output."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what users' modules print goes elsewhere

    def tell(answer: dict[str, Any]) -> None:
        out.write(json.dumps(answer).encode() + b"\n")
        out.flush()

    requests = sys.stdin.buffer
    job = Job.from_json(json.loads(requests.readline()))
    tokenizer = None
    try:
        for line in requests:
            index, unit = json.loads(line)
            try:
                tokenizer = tokenizer or job.load_tokenizer()
                with _Telling(tell) as progress:
                    parts.make(job, index, Unit.from_json(unit), tokenizer, progress=progress.add)
                tell({"made": True})
            except DataError as error:
                tell({"data_error": str(error)})
            except OSError as error:
                tell({"os_error": [error.errno, str(error.strerror or error)]})
            except Exception:
                tell({"traceback": traceback.format_exc()})
    except (BrokenPipeError, KeyboardInterrupt):
        pass  # the parent has gone
    with contextlib.suppress(OSError):
        out.close()
    os._exit(0)  # without waiting for threads of readers


class _Telling:
    """Progress, told not too often."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]):
        self._tell = tell
        self._sums = [0, 0, 0]
        self._last = time.monotonic()

    def __enter__(self) -> _Telling:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()

    def add(self, documents: int, tokens: int, position: int) -> None:
        for index, value in enumerate((documents, tokens, position)):
            self._sums[index] += value
        if time.monotonic() - self._last >= _TELL_SECONDS:
            self._flush()

    def _flush(self) -> None:
        self._tell({"progress": self._sums})
        self._sums, self._last = [0, 0, 0], time.monotonic()
