"""The examples in `launch/examples` are what the command renders today, and show what the page says of them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from examples import EXAMPLES, FOLDER, REPOSITORY, command, render

AGAIN = "python tests/launch/examples.py"


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_what_is_rendered(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    render(name)
    kept, rendered = REPOSITORY / FOLDER / name, tmp_path / FOLDER / name
    names = sorted(path.name for path in rendered.iterdir())
    assert sorted(path.name for path in kept.iterdir()) == names, f"render them anew: {AGAIN}"
    for file in names:
        assert (kept / file).read_text() == (rendered / file).read_text(), f"{name}/{file}: render it anew: {AGAIN}"


def test_there_is_nothing_else() -> None:
    assert sorted(path.name for path in (REPOSITORY / FOLDER).iterdir()) == sorted(EXAMPLES)


def test_the_page_has_the_commands() -> None:
    page = re.sub(r"\s*\\\n\s*", " ", (REPOSITORY / "launch/README.md").read_text())
    for name in EXAMPLES:
        assert f"t5x-like {shlex.join(command(name))}" in page, name
