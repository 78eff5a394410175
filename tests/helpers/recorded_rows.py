"""Rows that a run has trained on, as its processes have recorded them."""

from __future__ import annotations

from pathlib import Path

from t5x_like.utils.jsonl import read_records


def recorded_rows(workdir: Path) -> dict[int, list[tuple[str, int, int]]]:
    """Return the (sub-batch, index, checksum) of each row of each step, in ascending order, over all processes."""
    found: dict[int, list[tuple[str, int, int]]] = {}
    for path in workdir.glob("rows*.jsonl"):
        records = read_records(path)
        assert not records.unreadable and not records.gaps
        for record in records.records:
            step = found.setdefault(record.pop("step"), [])
            for name, rows in record.items():
                step += [(name, *row) for row in zip(rows["indices"], rows["crc32"], strict=True)]
    return {step: sorted(rows) for step, rows in found.items()}
