"""Resumable output after a kill at any byte: complete lines are kept; other settings and writers are refused."""

from pathlib import Path

import pytest

from t5x_like.errors import SafetyError
from t5x_like.utils.resumable_jsonl import (
    ResumableLines,
    claim,
    done_path,
    has_lines,
    join,
    part_path,
    read_settings,
)

SETTINGS = {"step": 3, "settings": {"temperature": 0.5, "stop": ["\n"]}}


def test_file_truncated_at_any_byte_keeps_complete_lines(tmp_path):
    whole = "".join(f'{{"row": {row}, "text": "é"}}\n' for row in range(4)).encode()
    path = tmp_path / "out.jsonl"
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        lines = ResumableLines(path)
        assert lines.lines == whole[:end].count(b"\n")
        lines.append(f'{{"row": {row}, "text": "é"}}' for row in range(lines.lines, 4))
        lines.close()
        assert path.read_bytes() == whole


def test_file_is_written_by_one_process(tmp_path):
    lines = ResumableLines(tmp_path / "out.jsonl")
    with pytest.raises(SafetyError, match="another process writes this file"):
        ResumableLines(tmp_path / "out.jsonl")
    lines.close()
    ResumableLines(tmp_path / "out.jsonl").close()


def test_lines_of_other_settings_are_refused_with_the_difference(tmp_path):
    path = tmp_path / "deep" / "out.jsonl"
    claim(path, SETTINGS, begun=False)
    assert read_settings(path) == SETTINGS
    other = {"step": 3, "settings": {"temperature": 0.7, "stop": ["\n"]}}
    claim(path, other, begun=False)
    claim(path, SETTINGS, begun=False)
    with pytest.raises(SafetyError, match=r"settings\.temperature: 0\.5 in the file, 0\.7 now"):
        claim(path, other, begun=True)
    claim(path, {"step": 3, "settings": {"temperature": 0.5, "stop": ("\n",)}}, begun=True)
    with pytest.raises(SafetyError, match="was not written by this command"):
        claim(tmp_path / "other.jsonl", SETTINGS, begun=True)


def test_path_that_is_not_a_regular_file_is_refused(tmp_path):
    for path in ("/dev/null", tmp_path):
        with pytest.raises(SafetyError, match="cannot be written|not a regular file"):
            ResumableLines(Path(path))


@pytest.mark.parametrize("rows", [0, 1, 5, 6, 7, 13])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_are_joined_in_order(tmp_path, rows, count):
    size = 2
    chunks = [[f"{row}\n" for row in range(start, min(start + size, rows))] for start in range(0, rows, size)]
    parts = [tmp_path / f"part{index}" for index in range(count)]
    for index, part in enumerate(parts):
        part.write_text("".join(line for chunk in chunks[index::count] for line in chunk))
        done_path(part).touch()
    join(tmp_path / "out", parts, size)
    assert (tmp_path / "out").read_text() == "".join(f"{row}\n" for row in range(rows))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]


def test_part_paths_are_distinct(tmp_path):
    assert part_path(tmp_path / "out", 0, 1) == tmp_path / "out"
    assert len({part_path(tmp_path / "out", index, 3) for index in range(3)}) == 3
    assert not has_lines(tmp_path / "out")
