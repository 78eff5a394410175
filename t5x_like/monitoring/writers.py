"""Metric writers. The JSONL file is the record of a run; every other writer is a convenience that may fail.

A writer is made by a function registered by name; `monitoring.writers` names the ones that a run uses besides the
record.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from t5x_like.utils.jsonl import RecordFile
from t5x_like.utils.name_registry import Registry

_LOG = logging.getLogger(__name__)


class Writer(Protocol):
    """Destination of metrics."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of a step."""

    def close(self) -> None:
        """Release the destination; nothing is written after this."""


WriterFactory = Callable[[Path, int | None], Writer]
"""Function (run directory, restored step) -> writer.

The restored step is that of the checkpoint from which training continues, None in a new run: metrics that were written
after it are about to be written again.
"""
WRITERS: Registry[WriterFactory] = Registry("metric writer")


def register_writer(name: str) -> Callable[[WriterFactory], WriterFactory]:
    """Return a decorator that registers a function or class (run directory, restored step) -> writer."""
    return WRITERS.decorator(name)


class JsonlWriter:
    """metrics.jsonl: one line per call, {"step": ..., name: value, ...}."""

    def __init__(self, path: Path, *, restored_step: int | None):
        """Open the file and drop the records after `restored_step`, as `RecordFile` does."""
        self._file = RecordFile(path, restored_step=restored_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.append({"step": step, **values})

    def close(self) -> None:
        self._file.close()


class NoWriter:
    """Writer of the processes that leave writing to the first one."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class TensorBoardWriter:
    """TensorBoard's event files, written without TensorFlow.

    It uses tensorboardX's file writer and not its SummaryWriter. The SummaryWriter writes in a thread behind a bounded
    queue; when the thread dies of a full disk, the training loop blocks forever at the eleventh value.
    """

    def __init__(self, directory: Path, *, restored_step: int | None):
        """Open a new event file in `directory`; events after `restored_step` are hidden from TensorBoard."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        directory.mkdir(parents=True, exist_ok=True)
        # File names are made of the second and the host. The process id keeps a quick restart from overwriting a file.
        self._file = EventsWriter(str(directory / "events"), filename_suffix=f".{os.getpid()}")
        self._event = Event
        first = 0 if restored_step is None else restored_step + 1
        self._put(Event(step=first, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._put(self._event(step=step, summary=scalar(name, float(value))))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _put(self, event: object) -> None:
        event.wall_time = time.time()  # type: ignore[attr-defined]
        self._file.write_event(event)


TENSORBOARD = "tensorboard"
"""Name of the TensorBoard writer, and of its folder in a run directory."""


@register_writer(TENSORBOARD)
def _tensorboard(run_dir: Path, restored_step: int | None) -> Writer:
    return TensorBoardWriter(run_dir / TENSORBOARD, restored_step=restored_step)


def require_registered(names: Sequence[str]) -> dict[str, WriterFactory]:
    """Return the factories of a run's writers by name; raise ConfigError for a name that is not registered."""
    return {name: WRITERS.lookup(name, f"monitoring.writers.{index}") for index, name in enumerate(names)}


class _FallibleWriter:
    """Writer that may fail at any time: it is opened again after 1, 2, 4, ... writes, up to `_MAX_PAUSE`."""

    _MAX_PAUSE = 64

    def __init__(self, name: str, open_writer: WriterFactory, run_dir: Path, restored_step: int | None):
        self._name, self._open, self._run_dir, self._last_step = name, open_writer, run_dir, restored_step
        self._writer: Writer | None = None
        self._pause, self._wait = 1, 0
        self._attempt(lambda writer: None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._wait > 0:
            self._wait -= 1
            return
        if self._attempt(lambda writer: writer.write(step, values)):
            self._last_step = step

    def close(self) -> None:
        if self._writer is not None:
            self._attempt(lambda writer: writer.close())

    def _attempt(self, action: Callable[[Writer], None]) -> bool:
        """Call `action` with the open writer and return True; after a failure close it and return False."""
        try:
            if self._writer is None:
                self._writer = self._open(self._run_dir, self._last_step)
            action(self._writer)
        except Exception as error:
            if self._pause == 1:
                reason = f"{type(error).__name__}: {error}"
                _LOG.warning("the writer %s failed (%s); training continues and tries it again", self._name, reason)
            self._wait = self._pause
            self._pause = min(2 * self._pause, self._MAX_PAUSE)
            failed, self._writer = self._writer, None
            if failed is not None:
                with contextlib.suppress(Exception):
                    failed.close()
            return False
        return True


class Writers:
    """All writers of a run. One that fails, other than the record, is reported once and tried again later."""

    def __init__(self, record: Writer, others: Sequence[Writer] = ()):
        """Combine writers.

        Args:
          record: The writer whose errors end the run: without a record the run cannot be judged.
          others: Writers that do not raise.
        """
        self._record = record
        self._others = others

    @staticmethod
    def of_run(
        names: Sequence[str], run_dir: Path, restored_step: int | None, *, record: Writer, display: Writer
    ) -> Writers:
        """Return the writers that a run names, beside its record and its display.

        Raises:
          ConfigError: a name that is not registered.
        """
        factories = require_registered(names)
        factories["progress"] = lambda run_dir, restored_step: display
        return Writers(
            record, [_FallibleWriter(name, make, run_dir, restored_step) for name, make in factories.items()]
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Pass the metrics of a step to every writer.

        Raises:
          OSError: the record cannot be written.
        """
        self._record.write(step, values)
        for writer in self._others:
            writer.write(step, values)

    def close(self) -> None:
        """Close every writer."""
        for writer in (self._record, *self._others):
            writer.close()
