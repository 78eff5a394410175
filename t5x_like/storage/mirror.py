"""Run directories in object stores: each process works in a local copy, and what it writes there is uploaded.

A run directory consists of small files, which many parts of the program read and append to, and of checkpoints. The
checkpoints are written to the object store directly (`checkpoints.bucket`). The files are downloaded to a local
directory when the run is opened, and uploaded when they have changed: every `UPLOAD_SECONDS`, before a checkpoint is
committed, and at the end. One process at a time owns the run: it holds a lease in the object store. The other processes
of a run upload only what they write, which is their own logs.

A process finds the copy that belongs to a local directory with `mirror_of`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from t5x_like.errors import ConfigError, ConfigProblem, DataError, SafetyError, UserError
from t5x_like.storage import lease as leases
from t5x_like.storage import locations, segments
from t5x_like.storage.lease import Lease
from t5x_like.storage.locations import AccessError, Url
from t5x_like.storage.segments import Segment
from t5x_like.utils.sanitize import say
from t5x_like.utils.stall_limit import end_thread

UPLOAD_SECONDS = 15.0
LEASE = "lease"
"""Key of the lease in a run directory."""
CHECKPOINTS = "checkpoints"
_RUN_ID = f"{CHECKPOINTS}/run_id"
_NOT_COPIED = (f"{CHECKPOINTS}/", "compilation_cache/", segments.FOLDER)
_GROWING = (".jsonl", ".txt")
"""Endings of files that are appended to, and uploaded in segments. TensorBoard's files are uploaded as a whole, because
TensorBoard reads them from the object store."""
LOCAL_ENDINGS = (".partial", ".unfinished", "lock")
THREADS = 8
_LOG = logging.getLogger(__name__)
Signature = tuple[int, int, int]
"""Size, time of the last change and inode of a file."""


def temporary_path(url: Url) -> tuple[Path, Path]:
    """Return a new temporary directory, and a path in it for the content of a URL.

    The end of the path is that of the URL, so that messages about local files say what they belong to.
    """
    temporary = Path(tempfile.mkdtemp(prefix="t5x-like-"))
    return temporary, temporary / url.text.replace("://", "/", 1)


class Mirror:
    """Local copy of the files of a run directory in an object store.

    Attributes:
      url: The run directory.
      path: The local directory; after `fetch` of the URL of a single object, a file.
      has_local_checkpoints: The checkpoints are in the local directory as well, in the layout of a local disk.
    """

    def __init__(self, url: Url) -> None:
        self.url = url
        self._temporary, self.path = temporary_path(url)
        self.path.mkdir(parents=True)
        self.has_local_checkpoints = False
        self._uploaded: dict[str, Signature] = {}
        self._segments: dict[str, list[Segment]] = {}
        self._stale: dict[str, list[int]] = {}
        self._lease: Lease | None = None
        self._refusals: list[UserError] = []
        self._uploading = threading.Lock()

    @contextlib.contextmanager
    def owned(self, patience: float) -> Iterator[None]:
        """Own the run within the context: hold its lease, and upload what this process writes.

        Args:
          patience: Seconds after which a lease that another process holds, and neither renews nor loses, is refused.

        Raises:
          SafetyError: another process trains in the run directory.
          UserError: the object store cannot be accessed.
        """

        def waiting(by: str) -> None:
            if patience:
                say(f"{self.url}: {by} holds the lease; waiting for up to {patience:g} s whether it is alive")

        try:
            with leases.lease(self.url / LEASE, waiting, refuse=True, patience=patience) as lease:
                # Without the right to list, an existing run would look like a new one.
                self.download(required=LEASE)
                self._lease = lease
                try:
                    with self._uploads():
                        yield
                finally:
                    self._lease = None
        except leases.HeldError as error:
            raise SafetyError(f"{error}: it trains in {self.url}; stop it or use another --workdir") from None

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Upload what this process writes within the context, while another process owns the run."""
        self.download()
        with self._uploads():
            yield

    @contextlib.contextmanager
    def _uploads(self) -> Iterator[None]:
        ended = threading.Event()
        self._refusals = []

        def upload_repeatedly() -> None:
            while not ended.wait(UPLOAD_SECONDS):
                try:
                    self.upload()
                    self._refusals = []
                except (UserError, OSError) as error:
                    _LOG.warning("%s: the files of the run could not be uploaded (%s)", self.url, error)
                    if isinstance(error, AccessError | SafetyError):
                        self._refusals.append(error)

        thread = threading.Thread(target=upload_repeatedly, name="upload", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            if end_thread(thread, 2 * locations.REQUEST_SECONDS):
                # A failure must not hide the error that ends the context, nor make a finished run a failure.
                with _warned(self.url):
                    self.upload(is_final=True)
            else:
                _LOG.warning("%s: an upload does not end, so the last files of the run are not uploaded", self.url)

    def require_access(self) -> None:
        """Raise the error of the last two uploads, if both were refused: credentials that have expired, for example.

        What a process computes after it can not be saved.
        """
        if len(self._refusals) > 1:
            raise self._refusals[-1]

    def download(self, required: str | None = None) -> None:
        """Copy the files of the run directory here, and remove others.

        Args:
          required: Key that must be listed, because it exists.

        Raises:
          UserError: the object store cannot be accessed, or does not list its keys.
        """
        listed = locations.keys(self.url, without=f"{CHECKPOINTS}/")
        if required is not None and required not in listed:
            raise DataError(
                f"{self.url}: found no {required!r} in the list of keys, expected it; may you list the bucket?"
            )
        names, starts = [name for name in listed if _is_copied(name)], segments.grouped(listed)
        if locations.children(self.url / CHECKPOINTS / "committed"):
            (self.path / CHECKPOINTS).mkdir(exist_ok=True)
        for name in set(self._files()) - {*names, _RUN_ID}:
            (self.path / name).unlink()
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda name: self._download(name, starts.get(name, ())), [*names, _RUN_ID]))

    def fetch(self) -> None:
        """Copy a directory, or a single object, here for reading.

        Checkpoints that were written to a local disk and copied to the object store, as those of an imported model, are
        copied too. Those of a run that was trained there are read from there.

        Raises:
          UserError: there is nothing at the URL, or the object store cannot be accessed.
        """
        if self.path.is_file():
            return
        self.download()
        folder = self.url / CHECKPOINTS
        steps = [f"{CHECKPOINTS}/{name}" for name in locations.keys_between(folder, "0", ":")]
        with ThreadPoolExecutor(THREADS) as pool:
            # A checkpoint does not change once it exists.
            list(pool.map(self._download, [name for name in steps if not (self.path / name).exists()]))
        self.has_local_checkpoints = bool(steps)
        if os.listdir(self.path):
            return
        is_bucket = self.url.text.count("/") < 3
        content = None if is_bucket else locations.read_bytes(self.url)
        if content is None:
            raise ConfigError([ConfigProblem(str(self.url), "no objects", "a file, or the directory of a model")])
        self.path.rmdir()
        self.path.write_bytes(content)

    def refresh(self, names: Iterable[str]) -> None:
        """Download what another process may have changed in some files, and remove those that do not exist.

        Raises:
          UserError: the object store cannot be accessed.
        """
        for name in names:
            before, known = b"", []
            with contextlib.suppress(FileNotFoundError):
                if self._uploaded.get(name) == signature(self.path / name):
                    before, known = (self.path / name).read_bytes(), self._segments.get(name, [])
            starts = segments.listed(self.url, name) if name.endswith(_GROWING) else []
            self._download(name, starts, before, known)

    def _download(
        self, name: str, starts: Sequence[int] = (), before: bytes = b"", known: Sequence[Segment] = ()
    ) -> None:
        target = self.path / name
        if not target.resolve().is_relative_to(self.path.resolve()):
            return
        content, found, stale = segments.read(self.url, name, starts, before, known)
        if content is None:
            target.unlink(missing_ok=True)
            self._forgotten(name)
            self._uploaded.pop(name, None)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        # What is downloaded is older than this process, as an exit.json of an earlier one is.
        os.utime(target, (0, 0))
        if _is_copied(name):
            self._uploaded[name] = signature(target)
            self._segments[name], self._stale[name] = found, stale

    def upload(self, *, is_final: bool = False) -> None:
        """Upload the files that have changed since they were downloaded or uploaded.

        Args:
          is_final: Leave one object of each file, and no segments.

        Raises:
          SafetyError: another process has taken the lease; nothing was uploaded.
          UserError: the object store cannot be accessed.
        """
        with self._uploading:
            if self._lease is not None:
                self._lease.require_held()
            present = self._files()
            for name in present:
                with contextlib.suppress(FileNotFoundError):
                    self._upload(name, is_final)
            for name in [name for name in self._uploaded if name not in present]:
                segments.remove(self.url, name, self._forgotten(name))
                del self._uploaded[name]

    def _upload(self, name: str, is_final: bool) -> None:
        # The signature is older than the content: what changes in between is uploaded again.
        found = signature(self.path / name)
        is_joined = is_final and len(self._segments.get(name, ())) > 1
        if self._uploaded.get(name) == found and not is_joined:
            return
        data, known, stale = (self.path / name).read_bytes(), self._segments.get(name, []), self._stale.get(name, [])
        is_whole = is_final or not name.endswith(_GROWING)
        # If it fails, nobody knows which objects exist: all of them are written anew.
        self._stale[name] = self._forgotten(name)
        self._segments[name] = segments.upload(self.url, name, data, known, stale, is_whole=is_whole)
        self._stale[name], self._uploaded[name] = [], found

    def _forgotten(self, name: str) -> list[int]:
        """Return the offsets of all objects of a file, and forget them."""
        return [*self._stale.pop(name, ()), *(segment.start for segment in self._segments.pop(name, ()))]

    def has_changes(self) -> bool:
        """Return whether a file here is not uploaded."""
        return any(self._uploaded.get(name) != signature(self.path / name) for name in self._files())

    def _files(self) -> list[str]:
        found = [path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file()]
        return sorted(name for name in found if _is_copied(name))

    def remove(self) -> None:
        """Remove the local directory."""
        shutil.rmtree(self._temporary, ignore_errors=True)


_MIRRORS: dict[Path, Mirror] = {}
"""The copies of this process, by local directory."""


def mirror_of(directory: Path) -> Mirror | None:
    """Return the mirror whose local directory is `directory`; None for any other directory."""
    return _MIRRORS.get(directory)


def open_mirror(url: Url) -> Mirror:
    """Return the mirror of a run directory, empty if there was none in this process."""
    for mirror in _MIRRORS.values():
        if mirror.url == url:
            return mirror
    mirror = Mirror(url)
    _MIRRORS[mirror.path] = mirror
    atexit.register(mirror.remove)
    return mirror


def local_copy(text: str, where: str) -> Path:
    """Return the local path for a path or URL that a configuration names, whose content is downloaded once.

    Args:
      text: A path, or the URL of a file or of the directory of a model.
      where: Name of the field, for messages.

    Raises:
      UserError: a URL of another service, or one that only a configuration of others names; there is nothing at the
        URL, or the object store cannot be accessed.
    """
    url = locations.location(text, where)
    if not isinstance(url, Url):
        return url
    is_new = all(mirror.url != url for mirror in _MIRRORS.values())
    mirror = open_mirror(url)
    if is_new:
        try:
            mirror.fetch()
        except BaseException:
            del _MIRRORS[mirror.path]
            raise
    return mirror.path


def original(path: Path | str) -> str:
    """Return the URL of which a local path is the copy, or of a file in it; of any other path, the path."""
    for mirror in _MIRRORS.values():
        if Path(path).is_relative_to(mirror.path):
            below = Path(path).relative_to(mirror.path).parts
            return str(functools.reduce(Url.__truediv__, below, mirror.url))
    return str(path)


def path_to_read(text: str, where: str) -> Path:
    """Return the local directory for a run directory at a URL, which `fetch` fills; no request is sent before.

    Raises:
      ConfigError: a URL of another service.
    """
    url = locations.location(text, where)
    return open_mirror(url).path if isinstance(url, Url) else url


def fetch(directory: Path) -> None:
    """Download the files of a run directory in an object store; do nothing for any other directory.

    Raises:
      UserError: there is nothing at the URL, or the object store cannot be accessed.
    """
    if (mirror := mirror_of(directory)) is not None:
        mirror.fetch()


def upload_results() -> None:
    """Upload what a command, other than training, has added to the run directories that it has read.

    A run may be in progress: such a command adds files of its own, and changes none that training writes.
    """
    for mirror in _MIRRORS.values():
        if mirror._lease is None and mirror.has_changes():
            mirror.upload()


def is_read_only(directory: Path) -> bool:
    """Return whether a directory is the copy of a run directory that this process does not own."""
    mirror = mirror_of(directory)
    return mirror is not None and mirror._lease is None


def require_access(directory: Path) -> None:
    """Raise UserError if the object store of a copy refuses what this process writes; see `Mirror.require_access`."""
    if (mirror := mirror_of(directory)) is not None:
        mirror.require_access()


def upload_now(directory: Path) -> None:
    """Upload the files in `directory` if it is a copy; failures are only reported."""
    if (mirror := mirror_of(directory)) is not None:
        with _warned(mirror.url):
            mirror.upload()


@contextlib.contextmanager
def _warned(url: Url) -> Iterator[None]:
    try:
        yield
    except (UserError, OSError) as error:
        _LOG.warning("%s: the files of the run could not be uploaded (%s)", url, error)


def _is_copied(name: str) -> bool:
    # Consoles represent folders by objects whose names end in a slash.
    is_other = name == LEASE or name.startswith(_NOT_COPIED) or name.endswith((*LOCAL_ENDINGS, "/"))
    return name == _RUN_ID or not is_other


def signature(path: Path) -> Signature:
    """Return what changes when a file is written."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino
