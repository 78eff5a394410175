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
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from t5x_like.errors import ConfigError, ConfigProblem, DataError, SafetyError, UserError
from t5x_like.storage import lease as leases
from t5x_like.storage import locations
from t5x_like.storage.lease import Lease
from t5x_like.storage.locations import Url
from t5x_like.utils.sanitize import say
from t5x_like.utils.stall_limit import end_thread

UPLOAD_SECONDS = 15.0
LEASE = "lease"
"""Key of the lease in a run directory."""
CHECKPOINTS = "checkpoints"
_RUN_ID = f"{CHECKPOINTS}/run_id"
_NOT_COPIED = (f"{CHECKPOINTS}/", "compilation_cache/")
_LOCAL_ENDINGS = (".partial", ".unfinished", "lock")
_THREADS = 8
_LOG = logging.getLogger(__name__)
_Signature = tuple[int, int, int]


class Mirror:
    """Local copy of the files of a run directory in an object store.

    Attributes:
      url: The run directory.
      path: The local directory.
    """

    def __init__(self, url: Url) -> None:
        self.url = url
        self._temporary = Path(tempfile.mkdtemp(prefix="t5x-like-"))
        # The end of the path is that of the URL, so that messages about local files say which run they belong to.
        self.path = self._temporary / url.text.replace("://", "/", 1)
        self.path.mkdir(parents=True)
        self._uploaded: dict[str, _Signature] = {}
        self._lease: Lease | None = None
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

        def upload_repeatedly() -> None:
            while not ended.wait(UPLOAD_SECONDS):
                try:
                    self.upload()
                except (UserError, OSError) as error:
                    _LOG.warning("%s: the files of the run could not be uploaded (%s)", self.url, error)

        thread = threading.Thread(target=upload_repeatedly, name="upload", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            if end_thread(thread, 2 * locations.REQUEST_SECONDS):
                # A failure must not hide the error that ends the context, nor make a finished run a failure.
                with _warned(self.url):
                    self.upload()
            else:
                _LOG.warning("%s: an upload does not end, so the last files of the run are not uploaded", self.url)

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
        names = [name for name in listed if _is_copied(name)]
        if locations.children(self.url / CHECKPOINTS / "committed"):
            (self.path / CHECKPOINTS).mkdir(exist_ok=True)
        for name in set(self._files()) - {*names, _RUN_ID}:
            (self.path / name).unlink()
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(self._download, [*names, _RUN_ID]))

    def _download(self, name: str) -> None:
        content = locations.read_bytes(self.url / name)
        target = self.path / name
        if content is None or not target.resolve().is_relative_to(self.path.resolve()):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        # What is downloaded is older than this process, as an exit.json of an earlier one is.
        os.utime(target, (0, 0))
        self._uploaded[name] = _signature(target)

    def upload(self) -> None:
        """Upload the files that have changed since they were downloaded or uploaded.

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
                    self._upload(name)
            for name in [name for name in self._uploaded if name not in present]:
                locations.remove_key(self.url / name)
                del self._uploaded[name]

    def _upload(self, name: str) -> None:
        # The signature is older than the content: what changes in between is uploaded again.
        signature = _signature(self.path / name)
        if self._uploaded.get(name) != signature:
            locations.write_bytes(self.url / name, (self.path / name).read_bytes())
            self._uploaded[name] = signature

    def has_changes(self) -> bool:
        """Return whether a file here is not uploaded."""
        return any(self._uploaded.get(name) != _signature(self.path / name) for name in self._files())

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
        mirror.download()
        if not os.listdir(mirror.path):
            raise ConfigError([ConfigProblem(str(mirror.url), "no objects", "a run directory")])


def upload_results() -> None:
    """Upload what a command, other than training, has added to the run directories that it has read."""
    for mirror in _MIRRORS.values():
        if mirror._lease is None and mirror.has_changes():
            try:
                with leases.lease(mirror.url / LEASE, lambda by: None, refuse=True):
                    mirror.upload()
            except leases.HeldError as error:
                say(f"{mirror.url}: the results were not added, because the run is in progress ({error})")


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
    return name == _RUN_ID or not (name == LEASE or name.startswith(_NOT_COPIED) or name.endswith(_LOCAL_ENDINGS))


def _signature(path: Path) -> _Signature:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino
