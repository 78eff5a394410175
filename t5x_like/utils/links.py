"""Symbolic links in a directory that others have made, such as a cloned repository."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from t5x_like.errors import SafetyError

_HUB_PREFIX = "models--"


def require_links_inside(directory: Path, names: Iterable[str] | None = None) -> None:
    """Check that no symbolic link below a directory leads out of it: what it leads to would be read, and copied into
    exports, as a part of the model.

    Args:
      directory: Directory of the model.
      names: Files to check, relative to the directory; None for everything below it.

    In the cache of Hugging Face's hub, the links of `models--NAME/snapshots/REVISION` lead to the files of
    `models--NAME/blobs`, which belong to the same model.

    Raises:
      SafetyError: a link leads elsewhere; the message names it.
    """
    real = directory.resolve()
    roots = [real]
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith(_HUB_PREFIX):
        roots.append(real.parent.parent / "blobs")
    for path in _paths_below(directory) if names is None else (directory / name for name in names):
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in roots):
            raise SafetyError(
                f"{path}: found a symbolic link to {path.resolve()}, expected links inside {directory}; if the "
                "file belongs to the model, copy it there"
            )


def _paths_below(directory: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(directory):
        if ".git" in folders:
            folders.remove(".git")
        yield from (Path(folder) / name for name in (*folders, *files))
