"""Where metrics go. The JSONL file is the record of a run; every other writer is a convenience that may fail."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from t5x_like.monitoring.records import RecordFile

_LOG = logging.getLogger(__name__)


class Writer(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the metrics of a step."""

    def close(self) -> None:
        """Nothing is written after this."""


class JsonlWriter:
    """metrics.jsonl: one line per call, {"step": ..., name: value, ...}."""

    def __init__(self, path: Path, *, restored_step: int | None):
        """As `RecordFile`: records after `restored_step` go, since they are about to be written again."""
        self._file = RecordFile(path, restored_step=restored_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.append({"step": step, **values})

    def close(self) -> None:
        self._file.close()


class NoWriter:
    """Of the processes that leave it to the first one to write."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class TensorBoardWriter:
    """TensorBoard's event files, written without TensorFlow.

    It uses tensorboardX's file writer and not its SummaryWriter: that one writes in a thread behind a bounded queue,
    and when the thread dies of a full disk, the training loop blocks for ever at the eleventh value.
    """

    def __init__(self, directory: Path, *, restored_step: int | None):
        """Opens a new event file in `directory`; events after `restored_step` are hidden from TensorBoard."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        directory.mkdir(parents=True, exist_ok=True)
        # Names are made of the second and the host: the process id keeps a quick restart from writing over the file.
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


class Writers:
    """All writers of a run. Those that may fail get one warning when they do, and nothing more to write."""

    def __init__(self, record: Writer, others: Sequence[Writer] = ()):
        """`record` is the writer whose errors end the run: without a record there is nothing to show for it."""
        self._record = record
        self._others = list(others)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hands the metrics of a step to every writer.

        Raises:
          OSError: the record cannot be written.
        """
        self._record.write(step, values)
        for writer in tuple(self._others):
            try:
                writer.write(step, values)
            except Exception as error:
                self._drop(writer, error)

    def close(self) -> None:
        self._record.close()
        for writer in tuple(self._others):
            try:
                writer.close()
            except Exception as error:
                self._drop(writer, error)

    def _drop(self, writer: Writer, error: Exception) -> None:
        self._others.remove(writer)
        name = type(writer).__name__
        _LOG.warning("%s failed (%s: %s); training goes on without it", name, type(error).__name__, error)
