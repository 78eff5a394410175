"""Bad records in the sources of data: left out, counted and listed up to a limit, and an error beyond it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from helpers.fault_runs import RECIPE, Workspace, finish, records_of

from t5x_like.data.store.token_store import Store
from t5x_like.errors import EXIT_USAGE

pytestmark = pytest.mark.slow

BAD = {
    3: b'{"text": "\xff\xfe"}',
    7: b'{"text": "cut in the mid',
    8: b'{"text": 5}',
    12: b'{"other": "a"}',
    19: b"[1, 2]",
}
"""Bad rows by line: not UTF-8, not complete JSON, another type, without the field, not an object."""


def prepare(files: Path, stores: Path, *overrides: str) -> tuple[str, ...]:
    options = ("--data.corpus.files", str(files), "--data.store-dir", str(stores))
    return ("prepare", f"{RECIPE}:recipe", *options, "--data.corpus.validation-fraction", "0.2", *overrides)


def test_bad_records_are_left_out_up_to_the_limit(workspace: Workspace, tmp_path: Path) -> None:
    """The store is that of the file without them; quarantine.jsonl names file and line of each."""
    good = [json.dumps({"text": f"text number {number}"}).encode() for number in range(20)]
    rows = good.copy()
    for line in sorted(BAD):
        rows.insert(line - 1, BAD[line])
    rows.append(b'{"text": ""}')
    for name, content in (("bad", rows), ("clean", good)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_bytes(b"\n".join(content))
    allowing = ("--data.corpus.max-bad-records", str(len(BAD)))
    output = finish(workspace.start(*prepare(tmp_path / "bad" / "*.jsonl", tmp_path / "s", *allowing)))
    assert "quarantine.jsonl lists them" in output and "Traceback" not in output
    finish(workspace.start(*prepare(tmp_path / "clean" / "*.jsonl", tmp_path / "t")))
    (quarantine,) = (tmp_path / "s").rglob("quarantine.jsonl")
    listed = [record["error"].partition(": ")[0] for record in records_of(quarantine)]
    assert listed == [f"{tmp_path / 'bad' / 'rows.jsonl'}:{line}" for line in sorted(BAD)]
    stores = [Store.open(next((tmp_path / name).rglob("COMMITTED")).parent) for name in ("s", "t")]
    assert stores[0].info["left_out"] == {"quarantined": len(BAD), "empty": 1}
    for split in ("train", "validation"):
        offsets = [store.split(split).offsets for store in stores]
        tokens = [
            store.split(split).gather(np.array([0]), int(o[-1])) for store, o in zip(stores, offsets, strict=True)
        ]
        assert np.array_equal(*offsets) and np.array_equal(*tokens)


def test_one_bad_record_more_and_a_truncated_file_are_errors(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n{"text": 5}\n{"text": "b"}\n{"text": 6}')
    allowing = ("--data.corpus.max-bad-records", "1")
    process = workspace.start(*prepare(tmp_path / "rows.jsonl", tmp_path / "s", *allowing))
    output = finish(process, EXIT_USAGE)
    assert f"{tmp_path / 'rows.jsonl'}:4: " in output and "expected at most 1" in output and "Traceback" not in output
    content = gzip.compress("\n".join(json.dumps({"text": f"{n * n}"}) for n in range(999)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(content[: len(content) // 2])
    process = workspace.start(*prepare(tmp_path / "cut.jsonl.gz", tmp_path / "s", *allowing))
    output = finish(process, EXIT_USAGE)
    assert f"{tmp_path / 'cut.jsonl.gz'}" in output and "Traceback" not in output
    assert not list((tmp_path / "s").rglob("COMMITTED"))
