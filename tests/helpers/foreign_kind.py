"""Kind of files that may come from others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Kind:
    """Kind of files.

    Attributes:
      make: Writes valid files into an empty folder.
      read: Reads the folder as the program does.
      forge: Called after a file was changed, to renew what an attacker would renew too, such as a digest.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], object]
    forge: Callable[[Path], None] = lambda folder: None
