"""Places for stores: folders, and keys of object stores by URL (`gs://`, `s3://`, `memory://`) through TensorStore.

A folder given as `file:///...` is the folder. Object stores have no rename and no folders; what they have, and what all
here rests on, is that a key is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorstore

from t5x_like.config.errors import DataError

CONTEXT = tensorstore.Context()
"""One for all: `memory://` is a place of its context."""


@dataclasses.dataclass(frozen=True)
class Url:
    """A place in an object store, with as much of pathlib's manners as stores need."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.text}/{name}")

    @property
    def name(self) -> str:
        return self.text.rpartition("/")[2]

    @property
    def parent(self) -> Url:
        return Url(self.text.rpartition("/")[0])

    def with_name(self, name: str) -> Url:
        return self.parent / name


Location = Path | Url
Buffer = bytes | memoryview


def location(text: str) -> Location:
    """The place that a path or URL names."""
    if text.startswith("file://"):
        return Path(urllib.parse.unquote(text[len("file://") :]))
    return Url(text.rstrip("/")) if "://" in text else Path(text)


def kvstore(place: Location) -> Any:
    """What TensorStore calls the place."""
    if isinstance(place, Url):
        return f"{place}/"
    return {"driver": "file", "path": str(place)}


@functools.lru_cache(maxsize=8)
def _keys(place: Url) -> Any:
    return _asked(place, lambda: tensorstore.KvStore.open(kvstore(place), context=CONTEXT))


def _asked(place: Location, ask: Callable[[], Any]) -> Any:
    """The result of what is asked of an object store."""
    try:
        return ask().result()
    except ValueError as error:  # TensorStore's name for whatever the service says
        raise DataError(f"{place}: found no object store that answers ({error}); see the URL and the rights") from None


def read_bytes(place: Location) -> bytes | None:
    """The contents of a file or key; None if there is none."""
    if isinstance(place, Url):
        found = _asked(place, lambda: _keys(place.parent).read(place.name))
        return bytes(found.value) if found.state == "value" else None
    try:
        return place.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_bytes(place: Location, *data: Buffer) -> None:
    """Writes a file or key, the pieces of `data` in a row. Whoever reads it, even after a kill, finds all of it
    or what was there before.

    Raises:
      OSError: of the file system.
      DataError: of the object store.
    """
    if isinstance(place, Url):
        _asked(place, lambda: _keys(place.parent).write(place.name, b"".join(data)))
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    unfinished = place.with_name(f"{place.name}.{os.getpid()}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            file.writelines(data)
        os.replace(unfinished, place)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def children(place: Location, prefix: str = "") -> list[str]:
    """Names directly under the place that begin with `prefix`, sorted."""
    if isinstance(place, Url):
        # From the parent's keys on: where nothing is, nothing is listed.
        keys = _asked(place, lambda: _keys(place).list())
        found = {key.decode().partition("/")[0] for key in keys}
    else:
        found = {path.name for path in place.iterdir()} if place.is_dir() else set()
    return sorted(name for name in found if name.startswith(prefix))


def exists(place: Location) -> bool:
    """Whether anything is there."""
    return bool(children(place)) if isinstance(place, Url) else place.exists()


def remove(place: Location) -> None:
    """Removes the place with all that is under it, if there is anything."""
    if isinstance(place, Url):
        _asked(place, lambda: _keys(place).delete_range(tensorstore.KvStore.KeyRange()))
        _asked(place, lambda: _keys(place.parent).write(place.name, None))
    elif place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
