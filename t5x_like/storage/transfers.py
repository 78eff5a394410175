"""Files that a command reads from object stores, and files and directories that it writes there, by local copies.

Inputs are downloaded before the command begins. Outputs are written to a temporary directory and uploaded when the
command has succeeded; what says that an output is complete is uploaded last. The lines of an output that a command
continues when it is run again are also uploaded while it runs, and when it fails.

An argument of the command line becomes a local path by `input_file`, `output_file` or `output_directory`, which send no
request; `transferred` finds the transfers that belong to the paths.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import logging
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, assert_never

from t5x_like.errors import ConfigError, ConfigProblem, UserError
from t5x_like.storage import locations
from t5x_like.storage.locations import Url
from t5x_like.storage.mirror import LOCAL_ENDINGS, THREADS, UPLOAD_SECONDS, Signature, signature, temporary_path
from t5x_like.utils.sanitize import say
from t5x_like.utils.stall_limit import end_thread

_DESCRIPTIONS = ("manifest.json", "model.json", "config.json")
"""Files without which a directory is no model; they are uploaded last."""
_SETTINGS = ".settings.json"
"""Ending of the name of the file beside an output that a command continues (`utils.resumable_jsonl`)."""
_PAUSE_FACTOR = 10.0
"""Shortest pause between uploads of a growing file, in times of the last upload: a file that is large is uploaded less
often."""
_LOG = logging.getLogger(__name__)
Kind = Literal["input", "output", "continued output", "directory"]


@dataclasses.dataclass(eq=False)
class _Transfer:
    """Local copy of a file or a directory.

    Attributes:
      url: Where it is in the object store.
      path: Where it is on this machine.
      temporary: Directory that contains the copy and nothing else.
      kind: What the command does with it.
      uploaded: What was uploaded, by name relative to the parent of the URL.
    """

    url: Url
    path: Path
    temporary: Path
    kind: Kind
    uploaded: dict[str, Signature] = dataclasses.field(default_factory=dict)
    _uploading: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def begin(self) -> None:
        """Download what the command reads, or make place for what it writes."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        match self.kind:
            case "input":
                content = locations.read_bytes(self.url)
                if content is None:
                    raise ConfigError([ConfigProblem(str(self.url), "no such object", "a file")])
                self.path.write_bytes(content)
            case "continued output":
                for name in (self.path.name, f"{self.path.name}{_SETTINGS}"):
                    if (content := locations.read_bytes(self.url.with_name(name))) is not None:
                        file = self.path.with_name(name)
                        file.write_bytes(content)
                        self.uploaded[name] = signature(file)
            case "directory":
                if locations.exists(self.url):
                    found, fix = "a URL with objects", "name another one"
                    raise ConfigError([ConfigProblem(str(self.url), found, "a URL without objects", fix)])
            case "output":
                # An object that exists is replaced, as a file is.
                pass
            case unknown:
                assert_never(unknown)

    def upload(self) -> int:
        """Upload the files that have changed, and return their number."""
        with self._uploading:
            changed = {name: found for name in self._files() if (found := self._changed(name)) is not None}
            last = [name for name in changed if self._is_last(name)]
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(self._upload, [name for name in changed if name not in last]))
            for name in sorted(last, key=_order):
                self._upload(name)
            self.uploaded |= changed
            return len(changed)

    def _files(self) -> list[str]:
        root = self.path.parent
        found = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
        return sorted(name for name in found if not name.endswith(LOCAL_ENDINGS))

    def _changed(self, name: str) -> Signature | None:
        # The signature is older than the content: what changes in between is uploaded again.
        found = signature(self.path.parent / name)
        return None if self.uploaded.get(name) == found else found

    def _is_last(self, name: str) -> bool:
        below = name.removeprefix(f"{self.path.name}/")
        return name == self.path.name or (self.kind == "directory" and below in _DESCRIPTIONS)

    def _upload(self, name: str) -> None:
        locations.write_bytes(self.url.with_name(name), (self.path.parent / name).read_bytes())

    def upload_repeatedly(self, ended: threading.Event) -> None:
        pause = UPLOAD_SECONDS
        while not ended.wait(pause):
            started = time.monotonic()
            try:
                self.upload()
            except (UserError, OSError) as error:
                _LOG.warning("%s: the lines could not be uploaded (%s)", self.url, error)
            pause = max(UPLOAD_SECONDS, _PAUSE_FACTOR * (time.monotonic() - started))

    def remove(self) -> None:
        shutil.rmtree(self.temporary, ignore_errors=True)


_TRANSFERS: dict[Path, _Transfer] = {}
"""The transfers of this process, by local path."""


def input_file(text: str, where: str) -> Path:
    """Return the path of a file that the command reads; of a URL, the local path that it is downloaded to.

    Args:
      text: Path or URL.
      where: Name of the argument, for messages.

    Raises:
      ConfigError: a URL of another service.
    """
    return _path_of(text, where, "input")


def output_file(text: str, where: str, *, is_continued: bool = False) -> Path:
    """Return the path of a file that the command writes; of a URL, the local path that it is uploaded from.

    Args:
      is_continued: The same command continues the file if it was interrupted.
    """
    return _path_of(text, where, "continued output" if is_continued else "output")


def output_directory(text: str, where: str) -> Path:
    """Return the path of a directory that the command creates; of a URL, the local path that it is uploaded from."""
    return _path_of(text, where, "directory")


def is_transferred(path: Path | None) -> bool:
    """Return whether a path stands for a URL."""
    return path in _TRANSFERS


def _path_of(text: str, where: str, kind: Kind) -> Path:
    url = locations.location(text, where)
    if not isinstance(url, Url):
        return url
    if url.text.count("/") < 3:
        raise ConfigError([ConfigProblem(where, repr(text), "a URL with a path in the bucket, as gs://BUCKET/PATH")])
    temporary, path = temporary_path(url)
    transfer = _TRANSFERS[path] = _Transfer(url, path, temporary, kind)
    atexit.register(transfer.remove)
    return path


@contextlib.contextmanager
def transferred(paths: Iterable[Path]) -> Iterator[None]:
    """Download the inputs among the paths before the context, and upload the outputs at its end.

    Raises:
      UserError: an input does not exist, the URL of a new directory is not free, or the object store cannot be
        accessed. Outputs that could not be uploaded stay on this machine, and a message names the directory.
    """
    transfers = [_TRANSFERS[path] for path in paths if path in _TRANSFERS]
    for transfer in transfers:
        transfer.begin()
    outputs = [transfer for transfer in transfers if transfer.kind != "input"]
    continued = [transfer for transfer in outputs if transfer.kind == "continued output"]
    ended = threading.Event()
    threads = [
        threading.Thread(target=one.upload_repeatedly, args=(ended,), name="upload", daemon=True) for one in continued
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    except BaseException:
        _end(threads, ended)
        for transfer in continued:
            # The error that ends the command is raised, and not that of the upload, which is only printed.
            with contextlib.suppress(Exception):
                _finish(transfer)
        raise
    _end(threads, ended)
    for transfer in outputs:
        _finish(transfer)


def _end(threads: Iterable[threading.Thread], ended: threading.Event) -> None:
    ended.set()
    for thread in threads:
        end_thread(thread, 2 * locations.REQUEST_SECONDS)


def _finish(transfer: _Transfer) -> None:
    try:
        number = transfer.upload()
    except BaseException:
        atexit.unregister(transfer.remove)
        say(f"{transfer.url}: not uploaded; the output stays in {transfer.path}", file=sys.stderr)
        raise
    if number:
        say(f"{transfer.url}: uploaded, {number} {'file' if number == 1 else 'files'}", file=sys.stderr)


def _order(name: str) -> int:
    file = name.rpartition("/")[2]
    return _DESCRIPTIONS.index(file) if file in _DESCRIPTIONS else -1
