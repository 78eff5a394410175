"""Metadata server of Google Compute Engine on localhost, for the two values that announce the end of a machine."""

from __future__ import annotations

import contextlib
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ROOT = "/computeMetadata/v1/instance/"


class MetadataServer:
    """Values and the requests for them.

    Attributes:
      host: "host:port".
      values: Value by name. A name that is not there has the status 404.
      flavor: Value of the header that identifies Google's server.
      requests: Number of answered requests by name.
    """

    def __init__(self) -> None:
        self.values = {"maintenance-event": "NONE", "preempted": "FALSE"}
        self.flavor = "Google"
        self.requests = dict.fromkeys(self.values, 0)
        self._changed = threading.Condition()
        self.is_closed = False
        self.host = ""

    def set(self, name: str, value: str) -> None:
        with self._changed:
            self.values[name] = value
            self._changed.notify_all()

    def wait_for_requests(self, name: str, count: int) -> None:
        """Wait until `count` requests for a value have been answered."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.requests[name] >= count, timeout=240)

    def answer(self, name: str, query: dict[str, str]) -> tuple[int, str, str]:
        """Return status, value and tag, after the wait that the query asks for."""
        with self._changed:
            if name not in self.values:
                return 404, "", ""
            if query.get("wait_for_change") == "true":
                known, seconds = query["last_etag"], float(query["timeout_sec"])
                self._changed.wait_for(lambda: self.is_closed or self._tag(name) != known, timeout=seconds)
            self.requests[name] += 1
            self._changed.notify_all()
            return 200, self.values[name], self._tag(name)

    def close(self) -> None:
        with self._changed:
            self.is_closed = True
            self._changed.notify_all()

    def _tag(self, name: str) -> str:
        return self.values[name].encode().hex()


@contextlib.contextmanager
def metadata_server() -> Iterator[MetadataServer]:
    """Run the server within the context."""
    metadata = MetadataServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urllib.parse.urlsplit(self.path)
            status, value, tag = 403, "", ""
            if self.headers.get("Metadata-Flavor") == "Google" and url.path.startswith(ROOT):
                query = dict(urllib.parse.parse_qsl(url.query))
                status, value, tag = metadata.answer(url.path.removeprefix(ROOT), query)
            with contextlib.suppress(OSError):
                self.send_response(status)
                self.send_header("Metadata-Flavor", metadata.flavor)
                self.send_header("ETag", tag)
                self.end_headers()
                self.wfile.write(value.encode())

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    metadata.host = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield metadata
    finally:
        metadata.close()
        server.shutdown()
        server.server_close()
        thread.join(10)
