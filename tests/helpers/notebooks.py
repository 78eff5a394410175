"""Notebooks without Jupyter: the cells of a file, and their execution in one namespace.

A kernel and its client would add some twenty packages to the environment of the tests. What they add to a test, outputs
and magics, these notebooks do not have.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple


class Cell(NamedTuple):
    """A cell: its number in the file, its kind ("markdown" or "code") and its text."""

    number: int
    kind: str
    text: str


def cells(path: Path) -> list[Cell]:
    """Return the cells of a notebook, in order."""
    found = json.loads(path.read_text())["cells"]
    return [Cell(number, cell["cell_type"], "".join(cell["source"])) for number, cell in enumerate(found)]


def execute(path: Path, replacements: dict[str, str] | None = None) -> dict[str, Any]:
    """Execute the code cells of a notebook in order and return their names.

    Args:
      path: The notebook.
      replacements: Text of the cells -> text that is executed, with fewer steps. Each must occur.

    Raises:
      LookupError: a text to replace does not occur.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    unused = dict(replacements or {})
    for cell in cells(path):
        if cell.kind != "code":
            continue
        text = cell.text
        for old, new in (replacements or {}).items():
            if old in text:
                unused.pop(old, None)
                text = text.replace(old, new)
        exec(compile(text, f"{path.name}, cell {cell.number}", "exec"), names)
    if unused:
        raise LookupError(f"{path.name}: found no {', '.join(map(repr, unused))}")
    return names
