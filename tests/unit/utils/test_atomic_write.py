"""Atomic writes of files and directories."""

from __future__ import annotations

from pathlib import Path

import pytest

from t5x_like.utils.atomic_write import new_directory, replaced_file, write_atomically


def test_file_is_replaced_and_no_temporary_file_is_left(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_atomically(path, "old")
    write_atomically(path, "néw")
    assert path.read_text(encoding="utf-8") == "néw"
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_atomically(path, "old")
    with pytest.raises(KeyboardInterrupt), replaced_file(path) as temporary:
        temporary.write_text("half of the new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_file_in_a_missing_directory_raises_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "file", "text")


def test_directory_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "model"
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "stale").touch()
    with pytest.raises(ValueError), new_directory(path) as temporary:
        (temporary / "first").touch()
        raise ValueError
    assert not list(tmp_path.iterdir())
    with new_directory(path) as temporary:
        (temporary / "first").touch()
        assert not path.exists()
    assert [child.name for child in path.iterdir()] == ["first"]
    assert list(tmp_path.iterdir()) == [path]
