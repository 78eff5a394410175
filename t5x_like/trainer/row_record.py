"""Record of the rows that each step has trained on, written if `monitoring.record_rows` is set.

Each process writes the rows that it loads, to rows.jsonl or rows.N.jsonl in the run directory: by sub-batch, the index
of each row (without indices in a live pipeline) and a checksum of its content. After a restart or a rollback the
records of the steps that are repeated are replaced. So the files together hold every row of the state that was reached,
once for each use, whatever happened in between and however many processes there were.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5x_like.data.stream.feature_converters import Features
from t5x_like.utils.jsonl import RecordFile
from t5x_like.utils.type_aliases import IntArray

_NAME = re.compile(r"rows(?:\.(\d+))?\.jsonl")


def rows_name(process: int) -> str:
    """Return the name of the file of a process in the run directory."""
    return f"rows.{process}.jsonl" if process else "rows.jsonl"


class RowRecord:
    """Writer of the rows of one process.

    Args:
      workdir: The run directory.
      process: Index of this process.
      processes: Number of processes.
      restored_step: Step that training continues from; None: the beginning.

    Raises (also the methods):
      OSError: a file cannot be written.
    """

    def __init__(self, workdir: Path, process: int, processes: int, restored_step: int | None):
        if process == 0:
            # An earlier start may have had more processes, whose steps are repeated by fewer.
            for path in workdir.glob("rows*.jsonl"):
                name = _NAME.fullmatch(path.name)
                if name is not None and int(name[1] or 0) >= processes:
                    RecordFile(path, restored_step=restored_step).close()
        self._file = RecordFile(workdir / rows_name(process), restored_step=restored_step)

    def write(self, step: int, batch: Mapping[str, Features], indices: Mapping[str, IntArray]) -> None:
        """Record the rows of a step.

        Args:
          step: Number of the step, from 1.
          batch: The rows of this process by sub-batch.
          indices: Their indices by sub-batch; empty in a live pipeline.
        """
        record: dict[str, Any] = {"step": step}
        for name, features in batch.items():
            record[name] = {"crc32": checksums(features)}
            if name in indices:
                record[name]["indices"] = indices[name].tolist()
        self._file.append(record)

    def close(self) -> None:
        self._file.close()


def checksums(features: Features) -> list[int]:
    """Return the CRC-32 of each row: of its features, in the order of their names."""
    arrays = [features[name] for name in sorted(features)]
    sums = []
    for row in range(len(arrays[0])):
        checksum = 0
        for array in arrays:
            checksum = zlib.crc32(array[row].tobytes(), checksum)
        sums.append(checksum)
    return sums
