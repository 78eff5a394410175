"""The examples in `launch/examples` equal the rendered files, and launch/README.md lists their commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from helpers.launch_examples import EXAMPLES, FOLDER, REPOSITORY, command, render

RENDER = "python tests/helpers/launch_examples.py"


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_equal_the_rendered_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    render(name)
    expected, rendered = REPOSITORY / FOLDER / name, tmp_path / FOLDER / name
    names = sorted(path.name for path in rendered.iterdir())
    assert sorted(path.name for path in expected.iterdir()) == names, f"render them again: {RENDER}"
    for file in names:
        assert (expected / file).read_text() == (rendered / file).read_text(), (
            f"{name}/{file}: render it again: {RENDER}"
        )


def test_there_are_no_other_examples() -> None:
    assert sorted(path.name for path in (REPOSITORY / FOLDER).iterdir()) == sorted(EXAMPLES)


def test_readme_lists_the_commands() -> None:
    page = re.sub(r"\s*\\\n\s*", " ", (REPOSITORY / "launch/README.md").read_text())
    for name in EXAMPLES:
        assert f"t5x-like {shlex.join(command(name))}" in page, name
