"""Files of studies: Python files with a function `study(tier, folder)`, which returns the study."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from t5x_like.config.recipes import call_function
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.studies.study import Study, Tier, require_valid
from t5x_like.utils.trusted_urls import require_local

FUNCTION = "study"
_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (Path("configs/studies"), _PACKAGE / "_configs/studies", _PACKAGE.parent / "configs/studies")
"""Folders of the studies that are named without a path: here, in an installed wheel, and in a source tree."""


def find_study(reference: str) -> Path:
    """Return the file of a study: `FILE.py`, or the name of one in configs/studies, here or among the shipped ones.

    Raises:
      ConfigError: there is no such file.
    """
    require_local(reference, "STUDY")
    path = Path(reference)
    if path.suffix == ".py" and path.is_file():
        return path
    known = shipped_studies()
    if path.suffix == "" and path.parent == Path(".") and reference in known:
        return known[reference]
    near = difflib.get_close_matches(path.stem, known, n=1, cutoff=0.5)
    fix = f"perhaps {near[0]}" if near else f"shipped studies: {', '.join(known) or 'none'}"
    raise ConfigError([ConfigProblem(reference, "no such study", "an existing FILE.py, or the name of a study", fix)])


def shipped_studies() -> dict[str, Path]:
    """Return the studies that can be named without a path; those of the current folder come first."""
    found: dict[str, Path] = {}
    for folder in _FOLDERS:
        for path in sorted(folder.glob("*.py")):
            found.setdefault(path.stem, path)
    return found


def study_folder(path: Path) -> Path:
    """Return the one spelling of the directory of a study: relative below the current folder, otherwise absolute.

    The configurations of its runs hold the paths of its files, and a run with another configuration is refused.
    """
    whole = os.path.abspath(path)
    below = Path(os.path.relpath(whole))
    return Path(whole) if os.pardir in below.parts else below


def load_study(path: Path, tier: Tier, folder: Path) -> Study:
    """Execute the file of a study and return the study.

    Args:
      path: The file.
      tier: Size of the study.
      folder: Directory of the study, for files that its arms read.

    Raises:
      ConfigError: the file has no function `study`, it returns something else, or the study has problems.
      UserError: the file raised an exception.
    """
    found = call_function(path, FUNCTION, lambda make: make(tier, folder), file="study", result="a Study")
    if not isinstance(found, Study):
        raise ConfigError([ConfigProblem(f"{path}:{FUNCTION}", f"a value of type {type(found).__name__}", "a Study")])
    require_valid(found)
    return found
