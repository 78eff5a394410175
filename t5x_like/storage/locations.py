"""Locations: local folders, and object stores by URL (`gs://`, `s3://`, `memory://`) through TensorStore.

`file:///...` is a local folder. Object stores have neither rename nor folders. This module relies on one property of
them only: a key is written completely or not at all.

A service with S3's interface is named by its endpoint: `s3://BUCKET/PATH?endpoint=URL`, or the environment variable
AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL. The region is that of AWS_REGION.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import shutil
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorstore

from t5x_like.errors import ConfigError, ConfigProblem, DataError
from t5x_like.faults import ACCESS_REFUSED, STORAGE_FAILED, FaultError, fault_of
from t5x_like.utils.atomic_write import replaced_file
from t5x_like.utils.stall_limit import progress, stall_seconds
from t5x_like.utils.trusted_urls import STORE_SCHEMES, require_trusted

_DRIVERS = {"gs": "gcs", "s3": "s3"}
WAIT_SECONDS = 10.0
"""Time after which an unanswered request to an object store is reported, each time."""
FILE_WAIT_SECONDS = 60.0
"""Time after which a file system that does not answer is reported, each time."""
REQUEST_SECONDS = 120.0
"""Time after which an unanswered request to an object store fails, its repetitions included. Of a file system, the
limit is that of a process without progress."""
_RETRIES = {"max_retries": 6, "initial_delay": "500ms", "max_delay": "8s"}
CONTEXT = tensorstore.Context({"s3_request_retries": _RETRIES, "gcs_request_retries": _RETRIES})
"""Shared by all arrays, since the contents of `memory://` belong to a context."""
_ANSWERED: set[tuple[str, str]] = set()
"""Buckets that have answered a request of this process: `SCHEME://BUCKET` and the endpoint."""
_LOG = logging.getLogger(__name__)


class AccessError(DataError):
    """The object store refuses access: there is no permission, or the credentials have expired."""


@dataclasses.dataclass(frozen=True)
class Url:
    """Location in an object store, with the part of pathlib's interface that stores need.

    Attributes:
      text: The URL.
      endpoint: URL of the service that has S3's interface; empty for that of the environment, or else Amazon's.
    """

    text: str
    endpoint: str = ""

    def __str__(self) -> str:
        return f"{self.text}?{urllib.parse.urlencode({'endpoint': self.endpoint})}" if self.endpoint else self.text

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.text}/{name}", self.endpoint)

    @property
    def name(self) -> str:
        return self.text.rpartition("/")[2]

    @property
    def parent(self) -> Url:
        return Url(self.text.rpartition("/")[0], self.endpoint)

    def with_name(self, name: str) -> Url:
        return self.parent / name


Location = Path | Url
Buffer = bytes | memoryview


def location(text: str, where: str = "data.store_dir") -> Location:
    """Return the location of a path or URL.

    Args:
      text: The path or URL.
      where: Name of the field or argument, for messages.

    Raises:
      ConfigError: a URL of another service, or with other parameters than an endpoint of S3.
      SafetyError: only a configuration in JSON names the URL.
    """
    if text.startswith("file://"):
        return Path(urllib.parse.unquote(text[len("file://") :]))
    if "://" not in text:
        return Path(text)
    require_trusted(text, STORE_SCHEMES, where)
    text, _, query = text.partition("?")
    fields = dict(urllib.parse.parse_qsl(query))
    endpoint = fields.pop("endpoint", "")
    if fields or (endpoint and not text.startswith("s3://")):
        expected = "s3://BUCKET/PATH?endpoint=URL, or a URL without ?"
        raise ConfigError([ConfigProblem(where, f"{text}?{query}", expected)])
    return Url(text.rstrip("/"), endpoint)


def kvstore(path: Location) -> Any:
    """Return the TensorStore key-value store specification of a location."""
    if not isinstance(path, Url):
        return {"driver": "file", "path": str(path)}
    scheme, _, rest = path.text.partition("://")
    bucket, _, key = f"{rest}/".partition("/")
    if scheme == "memory":
        return {"driver": "memory", "path": f"{rest}/"}
    spec = {"driver": _DRIVERS[scheme], "bucket": bucket, "path": key}
    endpoint = path.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if scheme == "s3" and endpoint:
        spec["endpoint"] = endpoint
        spec["aws_region"] = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return spec


@functools.lru_cache(maxsize=8)
def open_kvstore(url: Url) -> Any:
    """Return the TensorStore key-value store of what is below a URL."""
    return result(url, lambda: tensorstore.KvStore.open(kvstore(url), context=CONTEXT))


def wait(path: Location, future: Any) -> Any:
    """Return the result of a TensorStore request. A warning says when the storage does not answer.

    Raises:
      FaultError: the file system, or an object store that has answered before, does not answer; a restart resumes.
      DataError: an object store has not answered the first request: its address may be wrong.
      ValueError: TensorStore reports an error.
    """
    bucket = ("/".join(path.text.split("/")[:3]), path.endpoint) if isinstance(path, Url) else None
    storage = "file system" if bucket is None else "object store"
    interval, limit = (FILE_WAIT_SECONDS, stall_seconds()) if bucket is None else (WAIT_SECONDS, REQUEST_SECONDS)
    waited = 0.0
    while True:
        seconds = min(interval, limit - waited)
        try:
            found = future.result(timeout=seconds)
            break
        except TimeoutError:
            waited += seconds
        if waited >= limit:
            future.cancel()
            problem = f"{path}: the {storage} did not answer for {waited:g} s"
            if bucket is None:
                raise FaultError(f"{problem}, the limit of --stall-timeout; a restart resumes", STORAGE_FAILED)
            if bucket in _ANSWERED:
                raise FaultError(f"{problem}; a restart resumes", STORAGE_FAILED)
            raise DataError(f"{problem}; check the URL, the endpoint (AWS_ENDPOINT_URL) and the network")
        _LOG.warning("%s: waiting for the %s, for %g s now", path, storage, waited)
    progress()
    # To open a store sends no request.
    if bucket is not None and not isinstance(found, tensorstore.KvStore | tensorstore.TensorStore):
        _ANSWERED.add(bucket)
    return found


def result(url: Url, request: Callable[[], Any]) -> Any:
    """Run a request to an object store and return its result.

    Raises:
      FaultError: the object store or the network failed; a restart resumes.
      AccessError: the object store refuses access.
      DataError: any other error.
    """
    try:
        return wait(url, request())
    except ValueError as error:  # TensorStore reports every error of the service as a ValueError.
        fault = fault_of(str(error))
        if fault is not None and fault.restart:
            raise FaultError(f"{url}: {fault.name} ({error}); a restart resumes", fault) from None
        kind = AccessError if fault is ACCESS_REFUSED else DataError
        raise kind(f"{url}: the object store cannot be accessed ({error}); check the URL and the permissions") from None


def num_repeated_requests() -> int:
    """Return the number of requests of this process to object stores that were repeated after a transient error."""
    metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/")
    counts = [metric["values"] for metric in metrics if metric["name"].endswith("/retries")]
    return sum(int(value["value"]) for values in counts for value in values)


def read_bytes(path: Location) -> bytes | None:
    """Return the contents of a file or key; None if it does not exist."""
    if isinstance(path, Url):
        read = result(path, lambda: open_kvstore(path.parent).read(path.name))
        return bytes(read.value) if read.state == "value" else None
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_bytes(path: Location, *data: Buffer) -> None:
    """Write the concatenated buffers to a file or key atomically.

    A reader finds either all of the new data or the previous contents, even if the writer is killed.

    Raises:
      OSError: the file system reports an error.
      DataError: the object store reports an error.
    """
    if isinstance(path, Url):
        result(path, lambda: open_kvstore(path.parent).write(path.name, b"".join(data)))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Stores have many small files, which are flushed to the disk together before the store is complete.
    with replaced_file(path, suffix=f"{os.getpid()}.unfinished", sync=False) as temporary:
        with open(temporary, "wb") as file:
            file.writelines(data)


def read_key(path: Url) -> tuple[bytes | None, bytes]:
    """Return the value of a key, None if it does not exist, and its generation, which changes with each write."""
    read = result(path, lambda: open_kvstore(path.parent).read(path.name))
    return (bytes(read.value) if read.state == "value" else None), read.stamp.generation


def read_key_if_changed(path: Url, generation: bytes) -> tuple[bytes | None, bytes] | None:
    """Return what `read_key` does; None, and transfer no value, if the key still has `generation`."""
    read = result(path, lambda: open_kvstore(path.parent).read(path.name, if_not_equal=generation))
    if read.state == "unspecified":
        return None
    return (bytes(read.value) if read.state == "value" else None), read.stamp.generation


def replace_key(path: Url, value: bytes | None, generation: bytes) -> bytes:
    """Write or delete (None) a key if it still has `generation`; return its new generation, empty if it has not."""
    written = result(path, lambda: open_kvstore(path.parent).write(path.name, value, if_equal=generation))
    return bytes(written.generation)


def write_new(path: Url, value: bytes) -> bool:
    """Write a key that does not exist; return False, and write nothing, if it exists."""
    existing, generation = read_key(path)
    return existing is None and bool(replace_key(path, value, generation))


def keys(path: Url, prefix: str = "", without: str = "") -> list[str]:
    """Return the sorted names of the keys below `path`, relative to it.

    Args:
      path: URL of a folder.
      prefix: Beginning of the names. Others are not requested.
      without: Beginning of names that are left out, and not requested. Only one of the two may be given.
    """
    assert not (prefix and without), "names with one beginning and without another are not implemented"
    if without:
        names = [*keys_between(path, "", without), *keys_between(path, _after(without), "")]
    else:
        names = keys_between(path, prefix, _after(prefix) if prefix else "")
    if not names:
        # TensorStore's driver of Google Cloud Storage returns an empty list where the service refuses to list, but it
        # reports a refusal to read.
        read_key(path / "none")
    return names


def _after(prefix: str) -> str:
    """Return the first name behind all that begin with `prefix`."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


def keys_between(path: Url, first: str, end: str) -> list[str]:
    """Return the sorted names of the keys below `path` from `first` to before `end`; an empty `end` is no limit."""
    names = result(path, lambda: open_kvstore(path).list(tensorstore.KvStore.KeyRange(first, end)))
    return sorted(name.decode() for name in names)


def require_bucket(path: Url) -> None:
    """Raise DataError if the bucket of a key does not exist, which looks to a conditional write like its condition."""
    only = tensorstore.KvStore.KeyRange(path.name, f"{path.name}\0")
    result(path, lambda: open_kvstore(path.parent).list(only))


def remove_key(path: Url) -> None:
    """Remove a key, if it exists."""
    result(path, lambda: open_kvstore(path.parent).write(path.name, None))


def children(path: Location, prefix: str = "") -> list[str]:
    """Return the sorted names directly under `path` that begin with `prefix`; none if `path` does not exist."""
    if isinstance(path, Url):
        # Object stores list keys, not folders: every key below the children is requested, but none of other children.
        names = {key.partition("/")[0] for key in keys(path, prefix)}
    else:
        names = {child.name for child in path.iterdir()} if path.is_dir() else set()
    return sorted(name for name in names if name.startswith(prefix))


def exists(path: Location) -> bool:
    """Return whether a file, folder or key exists at or under `path`."""
    return bool(children(path)) if isinstance(path, Url) else path.exists()


def remove(path: Location) -> None:
    """Remove `path` and everything under it, if it exists."""
    if isinstance(path, Url):
        result(path, lambda: open_kvstore(path).delete_range(tensorstore.KvStore.KeyRange()))
        remove_key(path)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
