"""Most likely tokens of a teacher at each target of the rows of a run, made once and read by the index of the row.

STORE_DIR/teacher-DIGEST/       the digest is that of the teacher, the rows, the number of tokens and the temperature
  header.json                   the same values, the integer type of the ids, and the number of rows of a chunk
  SUB_BATCH-00000000.chunk      ids [rows, length, k], log-probabilities float32 [rows, length, k], CRC-32

Chunk n of a sub-batch begins with row n times the number of rows of a chunk. It is written as a whole, so that after a
kill the first one that is missing is made next. Runs with the same teacher and the same rows share them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like.config.batch_spec import TEACHER_IDS, TEACHER_LOG_PROBS
from t5x_like.config.data import DataConfig
from t5x_like.data.stream.feature_converters import Features
from t5x_like.errors import DataError, SafetyError
from t5x_like.faults import fault_of_os_error
from t5x_like.storage import locations
from t5x_like.storage.locations import Location
from t5x_like.utils.digests import json_digest
from t5x_like.utils.json_reader import parse_json
from t5x_like.utils.type_aliases import IntArray

_VERSION = 1
_HEADER = "header.json"
_CHUNK_BYTES = 2**24
_CACHED_CHUNKS = 4
"""Chunks of each sub-batch that are kept in memory."""
_REMOVE = "remove this folder, and the same command makes it again from the teacher"


@dataclasses.dataclass(frozen=True)
class Header:
    """Description of the stored distributions of a teacher.

    Attributes:
      identity: JSON values of what the numbers depend on.
      top_k: Number of tokens of each target.
      id_type: Integer type of the stored ids.
      lengths: Targets of a row by sub-batch.
      chunk_rows: Rows of a chunk by sub-batch.
    """

    identity: Mapping[str, Any]
    top_k: int
    id_type: str
    lengths: Mapping[str, int]
    chunk_rows: Mapping[str, int]

    @staticmethod
    def of(
        identity: Mapping[str, Any], top_k: int, vocab_size: int, shapes: Mapping[str, tuple[int, int]], steps: int
    ) -> Header:
        """Return the header of new distributions.

        Args:
          shapes: (rows, targets of a row) of a batch by sub-batch. A chunk has the rows of one or several batches.
          steps: Steps of the run, of which a chunk has at most the rows.
        """
        id_type = "uint16" if vocab_size <= 2**16 else "uint32"
        per_token = top_k * (np.dtype(id_type).itemsize + 4)
        chunk_rows = {
            name: rows * max(min(_CHUNK_BYTES // (rows * length * per_token), steps), 1)
            for name, (rows, length) in shapes.items()
        }
        lengths = {name: length for name, (_, length) in shapes.items()}
        return Header({"version": _VERSION, **identity}, top_k, id_type, lengths, chunk_rows)


class StoredTeacher:
    """Distributions of a teacher over its most likely tokens, in a folder or bucket.

    Args:
      path: Location of the chunks.
      header: Their description.
    """

    def __init__(self, path: Location, header: Header):
        self.path, self.header = path, header
        # Batches are read in order, by few threads that make several at a time.
        self._chunk = functools.lru_cache(maxsize=_CACHED_CHUNKS * len(header.chunk_rows))(self._read)

    def missing(self, first: Mapping[str, int], last: Mapping[str, int]) -> list[tuple[str, int]]:
        """Return (sub-batch, number) of the chunks that are missing for the rows `first` <= index < `last`, in order.

        Args:
          first, last: Indices of rows by sub-batch.
        """
        present = set(locations.children(self.path))
        return [
            (name, number)
            for name, rows in self.header.chunk_rows.items()
            for number in range(first[name] // rows, -(-last[name] // rows))
            if _chunk_name(name, number) not in present
        ]

    def rows(self, sub_batch: str, number: int) -> range:
        """Return the indices of the rows of a chunk."""
        rows = self.header.chunk_rows[sub_batch]
        return range(number * rows, (number + 1) * rows)

    def write(self, sub_batch: str, number: int, ids_RxLxK: IntArray, log_probs_RxLxK: npt.NDArray[np.float32]) -> None:
        """Write a chunk: the ids of the tokens and their log-probabilities for each of its rows."""
        parts = [
            np.ascontiguousarray(ids_RxLxK, self.header.id_type).tobytes(),
            np.ascontiguousarray(log_probs_RxLxK, "<f4").tobytes(),
        ]
        checksum = zlib.crc32(parts[1], zlib.crc32(parts[0])).to_bytes(4, "little")
        locations.write_bytes(self.path / _chunk_name(sub_batch, number), *parts, checksum)

    def features(self, sub_batch: str, index_N: IntArray) -> Features:
        """Return the features `teacher_ids` int32 [N, L, k] and `teacher_log_probs` float32 [N, L, k] of N rows.

        Raises:
          DataError: a chunk is missing.
          SafetyError: a chunk is damaged or unreadable.
        """
        shape = (len(index_N), self.header.lengths[sub_batch], self.header.top_k)
        out: Features = {TEACHER_IDS: np.empty(shape, np.int32), TEACHER_LOG_PROBS: np.empty(shape, np.float32)}
        chunk_N, row_N = np.divmod(index_N, self.header.chunk_rows[sub_batch])
        for number in np.unique(chunk_N).tolist():
            selected = chunk_N == number
            for name, values in zip(out, self._chunk(sub_batch, number), strict=True):
                out[name][selected] = values[row_N[selected]]
        return out

    def _read(self, sub_batch: str, number: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        path = self.path / _chunk_name(sub_batch, number)
        data = _bytes(path)
        if data is None:
            raise DataError(f"{path}: not found, expected the teacher's distributions of these rows; {_REMOVE}")
        header = self.header
        shape = (header.chunk_rows[sub_batch], header.lengths[sub_batch], header.top_k)
        id_type = np.dtype(header.id_type)
        size = int(np.prod(shape))
        expected = size * (id_type.itemsize + 4) + 4
        if len(data) != expected or zlib.crc32(data[:-4]).to_bytes(4, "little") != data[-4:]:
            raise SafetyError(
                f"{path}: damaged ({len(data):,} bytes, expected {expected:,} and their CRC-32); {_REMOVE}"
            )
        ids = np.frombuffer(data, id_type, size).reshape(shape)
        return ids, np.frombuffer(data, "<f4", size, size * id_type.itemsize).reshape(shape)


def stored_teacher_path(data: DataConfig, header: Header) -> Location:
    """Return the folder of the distributions, in that of the data's stores."""
    return locations.location(data.store_dir) / f"teacher-{json_digest(header.identity)[:16]}"


def open_stored_teacher(data: DataConfig, header: Header, *, create: bool) -> StoredTeacher:
    """Return the distributions that this or an earlier run has begun.

    Args:
      data: Configuration with the folder of the stores.
      header: Their description; the number of rows of a chunk is that of the run that has begun them.
      create: Begin new ones if there are none. One process at a time may do so.

    Raises:
      SafetyError: there are none, or their header is damaged or unreadable.
    """
    path = stored_teacher_path(data, header)
    text = _bytes(path / _HEADER)
    if text is None:
        if not create:
            raise SafetyError(
                f"{path}: not found, expected the folder that process 0 has written; set --data.store-dir to a folder "
                "or bucket that all hosts share"
            )
        locations.write_bytes(path / _HEADER, json.dumps(dataclasses.asdict(header), indent=2).encode() + b"\n")
        return StoredTeacher(path, header)
    try:
        found = Header(**parse_json(text))
        # Its chunks can have another number of rows, of a run with another batch size.
        if dataclasses.replace(found, chunk_rows=header.chunk_rows) != header:
            raise ValueError("other values than those of its name")
        if found.chunk_rows.keys() != header.chunk_rows.keys() or not all(
            map(_is_row_count, found.chunk_rows.values())
        ):
            raise ValueError("expected a number of rows for each sub-batch")
    except (ValueError, TypeError, AttributeError) as error:
        raise SafetyError(f"{path / _HEADER}: damaged ({error}); {_REMOVE}") from None
    return StoredTeacher(path, found)


def _bytes(path: Location) -> bytes | None:
    try:
        return locations.read_bytes(path)
    except OSError as error:
        if fault_of_os_error(error) is not None:
            raise  # A fault of the storage has an exit code of its own: after a restart the file may be readable.
        raise SafetyError(f"{path}: unreadable ({error.strerror}), expected a file; {_REMOVE}") from None


def _is_row_count(value: object) -> bool:
    return isinstance(value, int) and 0 < value < 2**40


def _chunk_name(sub_batch: str, number: int) -> str:
    return f"{sub_batch}-{number:08d}.chunk"
