"""The output file after a kill at any byte: what is whole stays, other settings and other writers are refused."""

from pathlib import Path

import pytest

from t5x_like.config import RefusedError
from t5x_like.decoding.journal import Journal, claim, done_path, has_lines, join, part_path, read_settings

SETTINGS = {"step": 3, "settings": {"temperature": 0.5, "stop": ["\n"]}}


def test_a_file_cut_at_any_byte_goes_on_with_whole_lines(tmp_path):
    whole = "".join(f'{{"row": {row}, "text": "é"}}\n' for row in range(4)).encode()
    path = tmp_path / "out.jsonl"
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        lines = Journal(path)
        assert lines.lines == whole[:end].count(b"\n")
        lines.append(f'{{"row": {row}, "text": "é"}}' for row in range(lines.lines, 4))
        lines.close()
        assert path.read_bytes() == whole


def test_one_process_writes(tmp_path):
    lines = Journal(tmp_path / "out.jsonl")
    with pytest.raises(RefusedError, match="another process writes it"):
        Journal(tmp_path / "out.jsonl")
    lines.close()
    Journal(tmp_path / "out.jsonl").close()


def test_lines_of_other_settings_are_refused_with_the_difference(tmp_path):
    path = tmp_path / "deep" / "out.jsonl"
    claim(path, SETTINGS, begun=False)
    assert read_settings(path) == SETTINGS
    other = {"step": 3, "settings": {"temperature": 0.7, "stop": ["\n"]}}
    claim(path, other, begun=False)
    claim(path, SETTINGS, begun=False)
    with pytest.raises(RefusedError, match=r"settings\.temperature: 0\.5 there, 0\.7 now"):
        claim(path, other, begun=True)
    claim(path, {"step": 3, "settings": {"temperature": 0.5, "stop": ("\n",)}}, begun=True)
    with pytest.raises(RefusedError, match="was not written by this command"):
        claim(tmp_path / "other.jsonl", SETTINGS, begun=True)


def test_what_is_no_file_of_lines_is_refused(tmp_path):
    for path in ("/dev/null", tmp_path):
        with pytest.raises(RefusedError, match="cannot be written|can be cut"):
            Journal(Path(path))


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


def test_names_of_parts(tmp_path):
    assert part_path(tmp_path / "out", 0, 1) == tmp_path / "out"
    assert len({part_path(tmp_path / "out", index, 3) for index in range(3)}) == 3
    assert not has_lines(tmp_path / "out")
