import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from t5x_like.utils.jsonl import RecordFile, read_records


def write(path: Path, steps, restored_step=None):
    records = RecordFile(path, restored_step=restored_step)
    for step in steps:
        records.append({"step": step, "loss": 10.0 / step})
    records.close()


def test_resumed_file_equals_that_of_an_uninterrupted_run(tmp_path):
    write(tmp_path / "whole", range(1, 9))
    write(tmp_path / "resumed", range(1, 7))
    write(tmp_path / "resumed", range(5, 9), restored_step=4)
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_new_run_starts_with_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    write(path, range(1, 3), restored_step=None)
    assert [record["step"] for record in read_records(path)[0]] == [1, 2]


@pytest.mark.parametrize("cut", range(1, 24))
def test_every_torn_last_line_is_repaired(tmp_path, cut):
    write(tmp_path / "whole", range(1, 9))
    torn = tmp_path / "torn"
    write(torn, range(1, 7))
    data = torn.read_bytes()
    torn.write_bytes(data[:-cut])
    restored_step = len(data[:-cut].splitlines()) - 1 or None
    write(torn, range((restored_step or 0) + 1, 9), restored_step=restored_step)
    assert torn.read_bytes() == (tmp_path / "whole").read_bytes()


def test_record_without_its_line_feed_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    RecordFile(path, restored_step=2).close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("offset", [0, 9, 25, -40, -25, -24, -22, -10, -2, -1])
def test_a_flipped_bit_costs_one_record_and_is_announced(tmp_path, caplog, offset):
    """A flipped bit anywhere in a line, its check and line feed included, never changes a number undetected."""
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 7))
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = bytearray(lines[2])
    damaged[offset] ^= 1
    path.write_bytes(b"".join([*lines[:2], bytes(damaged), *lines[3:]]))
    lost = {3, 4} if offset == -1 else {3}
    intact = [step for step in range(1, 7) if step not in lost]
    write(path, [7], restored_step=6)
    found = read_records(path)
    assert [record["step"] for record in found.records] == [*intact, 7]
    assert found.records[0] == {"step": 1, "loss": 10.0}
    assert found.unreadable == 1 and found.gaps == [(2, max(lost) + 1)]
    assert "1 damaged lines are skipped" in caplog.text


@pytest.mark.parametrize(("cut", "gap"), [(slice(2, 4), (2, 5)), (slice(0, 1), (None, 2))])
def test_missing_lines_are_announced(tmp_path, caplog, cut, gap):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 7))
    lines = path.read_bytes().splitlines(keepends=True)
    del lines[cut]
    path.write_bytes(b"".join(lines))
    write(path, [], restored_step=6)
    assert read_records(path).gaps == [gap]
    before, after = gap
    expected = f"before step {after}" if before is None else f"between the steps {before} and {after}"
    assert f"records {expected} are missing" in caplog.text


def test_record_of_a_known_step_replaces_it(tmp_path):
    records = RecordFile(tmp_path / "evaluations.jsonl", restored_step=None)
    for step, loss in ((10, 3.0), (20, 2.0), (20, 2.5)):
        records.append({"step": step, "loss": loss})
    assert [record["loss"] for record in read_records(records.path)[0]] == [3.0, 2.5]


def test_values_that_json_cannot_represent_are_read_back(tmp_path):
    records = RecordFile(tmp_path / "metrics.jsonl", restored_step=None)
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": np.float32(0.1), "e": np.int32(3)}
    records.append({"step": np.int64(1), **values})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads(records.path.read_text(), parse_constant=refuse)
    (record,), unreadable, gaps = read_records(records.path)
    assert (unreadable, gaps) == (0, [])
    assert math.isnan(record["a"]) and record["b"] == math.inf and record["c"] == -math.inf
    assert np.float32(record["d"]) == np.float32(0.1)
    assert record["e"] == 3


def test_lines_survive_sigkill(tmp_path):
    path = tmp_path / "metrics.jsonl"
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from t5x_like.utils.jsonl import RecordFile\n"
        "records = RecordFile(Path(sys.argv[1]), restored_step=None)\n"
        "for step in range(1, 101): records.append({'step': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", program, str(path)], env={**os.environ})
    assert result.returncode == -signal.SIGKILL
    assert [record["step"] for record in read_records(path)[0]] == list(range(1, 101))
