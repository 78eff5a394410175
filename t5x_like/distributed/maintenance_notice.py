"""Notices of Google Compute Engine that this machine will be stopped, for maintenance or because it is preemptible.

The metadata server of the machine tells of maintenance up to an hour before and of a preemption 30 seconds before. One
thread for each of the two values waits for its change. A notice is a request to stop, as SIGTERM is.

Protocol: https://cloud.google.com/compute/docs/metadata/querying-metadata and
https://cloud.google.com/compute/docs/instances/host-maintenance-overview.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

HOST_VARIABLE = "GCE_METADATA_HOST"
"""Environment variable with the host, and the port, of the metadata server; Google's libraries read it as well."""
VALUES: Mapping[str, tuple[str, ...]] = {
    "maintenance-event": ("TERMINATE_ON_HOST_MAINTENANCE",),
    "preempted": ("TRUE",),
}
"""Notices by name of the value below computeMetadata/v1/instance. A live migration does not stop the machine."""
_DEFAULT_HOST = "metadata.google.internal"
_PRODUCT = Path("/sys/class/dmi/id/product_name")
_WAIT_SECONDS = 60
_REQUEST_SECONDS = 10
"""Time that a request may take in addition to the wait that it asks for."""
_RETRY_SECONDS = 5.0
_MAX_BYTES = 4096
_FLAVOR = {"Metadata-Flavor": "Google"}
_LOG = logging.getLogger(__name__)


def metadata_host(environment: Mapping[str, str] = os.environ, product: Path = _PRODUCT) -> str | None:
    """Return the host of the metadata server; None on machines that have none. Nothing is requested."""
    if configured := environment.get(HOST_VARIABLE):
        return configured
    try:
        return _DEFAULT_HOST if product.read_text(encoding="utf-8").startswith("Google") else None
    except (OSError, UnicodeDecodeError):
        return None


@contextlib.contextmanager
def watch_notices(host: str | None, on_notice: Callable[[str], None]) -> Iterator[None]:
    """Call `on_notice` with a description of each notice that arrives within the context, in a thread.

    A notice that was there before is logged only: a process that was restarted because of it trains until the machine
    is stopped.

    Args:
      host: Host of the metadata server; None: there are no notices.
      on_notice: Called with the name and the value of the notice.
    """
    stop = threading.Event()
    for name in VALUES if host is not None else ():
        assert host is not None
        work = threading.Thread(target=_watch, args=(host, name, on_notice, stop), name=f"watch {name}", daemon=True)
        work.start()
    try:
        yield
    finally:
        # A thread that waits for an answer is not waited for.
        stop.set()


def _watch(host: str, name: str, on_notice: Callable[[str], None], stop: threading.Event) -> None:
    last: tuple[str, str] | None = None
    while not stop.is_set():
        asked = time.monotonic()
        try:
            value, tag = _request(host, name, None if last is None else last[1])
        except LookupError as error:
            _LOG.info("no notices of %s: %s", name, error)
            return
        except (OSError, http.client.HTTPException) as error:
            _LOG.debug("the metadata server %s does not answer: %s", host, error)
            stop.wait(_RETRY_SECONDS)
            continue
        if stop.is_set():
            return
        if value in VALUES[name]:
            if last is None:
                _LOG.warning("this machine will be stopped (%s: %s)", name, value)
            elif value != last[0]:
                on_notice(f"{name} {value}")
        if (value, tag) == last and time.monotonic() - asked < 1.0:
            # This server does not wait for a change.
            stop.wait(_RETRY_SECONDS)
        last = (value, tag)


def _request(host: str, name: str, tag: str | None) -> tuple[str, str]:
    """Return a value and its tag; with the tag of the known value, wait for another one for a limited time.

    Raises:
      LookupError: this server has no such value, or is not Google's.
      OSError, HTTPException: the server does not answer.
    """
    path = f"/computeMetadata/v1/instance/{name}"
    seconds = _REQUEST_SECONDS
    if tag is not None:
        query = {"wait_for_change": "true", "timeout_sec": _WAIT_SECONDS, "last_etag": tag}
        path += "?" + urllib.parse.urlencode(query)
        seconds += _WAIT_SECONDS
    with contextlib.closing(http.client.HTTPConnection(host, timeout=seconds)) as connection:
        connection.request("GET", path, headers=_FLAVOR)
        answer = connection.getresponse()
        text = answer.read(_MAX_BYTES).decode("utf-8", errors="replace").strip()
    if answer.status in (403, 404) or answer.getheader("Metadata-Flavor") != "Google":
        raise LookupError(f"{host} answers with status {answer.status}")
    if answer.status != 200:
        raise ConnectionError(f"{host} answers with status {answer.status}")
    return text, answer.getheader("ETag") or "0"
