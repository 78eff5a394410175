"""Pages of the notebooks: their text and their code, and the notebook itself to download."""

from __future__ import annotations

import json
from pathlib import Path


def pages(folder: Path) -> dict[str, str]:
    """Return the page of each notebook in a folder, by its file name."""
    return {f"{path.stem}.md": page(path) for path in sorted(folder.glob("*.ipynb"))}


def page(path: Path) -> str:
    """Return a notebook, whose first cell begins with its title, as Markdown."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    title, _, introduction = parts[0].partition("\n")
    return "\n\n".join([title, f"[{path.name}]({path.name})", introduction.strip(), *parts[1:]]) + "\n"
