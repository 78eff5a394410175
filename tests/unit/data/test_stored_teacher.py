"""Stored distributions of a teacher: chunks by row, what is missing, and damage."""

import dataclasses
import errno
import json

import numpy as np
import pytest
from helpers.task_head_examples import labeled_run

from t5x_like.data.stream.stored_teacher import Header, open_stored_teacher
from t5x_like.errors import DataError, SafetyError
from t5x_like.storage import locations

ROWS, LENGTH, TOP_K = 4, 6, 3


def header(rows=ROWS, **identity):
    shapes = {"main": (rows, LENGTH), "targets_4": (2, 4)}
    return Header.of({"teacher": "a", **identity}, TOP_K, 300, shapes, steps=1)


@pytest.fixture
def data(tmp_path):
    return dataclasses.replace(labeled_run().data, store_dir=str(tmp_path))


def numbers(chunk):
    random = np.random.default_rng(chunk)
    shape = (ROWS, LENGTH, TOP_K)
    return random.integers(0, 300, shape).astype(np.int32), random.normal(size=shape).astype(np.float32)


def test_rows_of_any_order_are_read_by_their_index(data):
    stored = open_stored_teacher(data, header(), create=True)
    for chunk in range(3):
        stored.write("main", chunk, *numbers(chunk))
    # A run with another batch size reads the same chunks.
    again = open_stored_teacher(data, header(rows=5), create=False)
    index = np.array([11, 0, 5, 4, 11])
    features = again.features("main", index)
    for name, dtype, position in (("teacher_ids", "int32", 0), ("teacher_log_probs", "float32", 1)):
        expected = [numbers(row // ROWS)[position][row % ROWS] for row in index.tolist()]
        np.testing.assert_array_equal(features[name], expected)
        assert features[name].dtype == dtype


def test_missing_chunks_are_those_of_the_rows_that_are_read(data):
    stored = open_stored_teacher(data, header(), create=True)
    stored.write("main", 1, *numbers(1))
    first, last = {"main": 5, "targets_4": 2}, {"main": 13, "targets_4": 6}
    assert stored.missing(first, last) == [("main", 2), ("main", 3), ("targets_4", 1), ("targets_4", 2)]
    with pytest.raises(DataError, match="main-00000002.chunk: not found"):
        stored.features("main", np.array([8]))


def test_damage_is_refused_and_another_teacher_has_its_own_folder(data):
    stored = open_stored_teacher(data, header(), create=True)
    stored.write("main", 0, *numbers(0))
    path = stored.path / "main-00000000.chunk"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    with pytest.raises(SafetyError, match="main-00000000.chunk: damaged"):
        stored.features("main", np.array([1]))
    other = open_stored_teacher(data, header(teacher="b"), create=True)
    assert other.path != stored.path and other.missing({"main": 0, "targets_4": 0}, {"main": 1, "targets_4": 0})
    (stored.path / "header.json").write_text((other.path / "header.json").read_text())
    with pytest.raises(SafetyError, match="header.json: damaged"):
        open_stored_teacher(data, header(), create=False)


@pytest.mark.parametrize(
    "change", [{"chunk_rows": {"main": 0, "targets_4": 2}}, {"chunk_rows": {"main": 4}}, {"id_type": "O"}, {"top_k": 9}]
)
def test_header_of_other_numbers_is_damaged(data, change):
    stored = open_stored_teacher(data, header(), create=True)
    path = stored.path / "header.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SafetyError, match="header.json: damaged"):
        open_stored_teacher(data, header(), create=True)


def test_folder_in_place_of_a_file_is_refused_and_a_fault_of_the_storage_is_not(data, monkeypatch):
    """A launcher restarts a run after a stale file handle, and does not after a refusal."""

    def stale(path):
        raise OSError(errno.ESTALE, "Stale file handle")

    stored = open_stored_teacher(data, header(), create=True)
    with monkeypatch.context() as patched:
        patched.setattr(locations, "read_bytes", stale)
        with pytest.raises(OSError, match="Stale"):
            open_stored_teacher(data, header(), create=False)
    (stored.path / "header.json").unlink()
    (stored.path / "header.json").mkdir()
    with pytest.raises(SafetyError, match="header.json: unreadable"):
        open_stored_teacher(data, header(), create=False)


def test_process_that_sees_no_folder_of_process_0_names_the_shared_one(data):
    with pytest.raises(SafetyError, match="--data.store-dir"):
        open_stored_teacher(data, header(), create=False)


def test_chunks_have_several_small_batches_or_one_large_one():
    shapes = {"main": (16, 128), "large": (4096, 512)}
    made = Header.of({}, 8, 2**17, shapes, steps=10**6)
    assert made.id_type == "uint32"
    assert made.chunk_rows["main"] % 16 == 0 and 1e7 < made.chunk_rows["main"] * 128 * 8 * 8 <= 2**24
    assert made.chunk_rows["large"] == 4096
    assert Header.of({}, 8, 2**17, shapes, steps=3).chunk_rows["main"] == 48
