"""Proxy in front of a server of tests/buckets, which adds what the server lacks, and faults.

The fake server of Google Cloud Storage ignores the condition of a simple upload (`ifGenerationMatch`), which the real
one checks: the proxy checks it. Of the faults, every n-th request is answered by an error, by a part of the
answer, or done without an answer. Answers can also be late.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import http.server
import json
import threading
import time
import urllib.parse
from collections.abc import Iterator

from helpers.bucket_servers import Server, environment

_OWN_HEADERS = ("connection", "transfer-encoding", "content-length", "keep-alive")


@dataclasses.dataclass
class Faults:
    """Faults of a proxy.

    Attributes:
      status: Status with which requests are answered; 0: they are passed on.
      every: Only every n-th request has a fault.
      is_lost: The request is passed on, and its answer is not.
      is_cut: The answer ends in the middle of its body.
      seconds: Time that each answer takes; every tenth takes four times as long.
      injected: Number of faults so far.
    """

    status: int = 0
    every: int = 1
    is_lost: bool = False
    is_cut: bool = False
    seconds: float = 0.0
    injected: int = 0


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: str
    kind: str
    faults: Faults
    lock: threading.Lock
    count: int

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def handle_request(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        with type(self).lock:
            type(self).count += 1
            number, faults = type(self).count, self.faults
            is_due = number % faults.every == 0 and bool(faults.status or faults.is_lost or faults.is_cut)
            faults.injected += is_due
            if not is_due or not faults.status:
                # One request at a time, so that a condition is checked and used at once.
                answer = self._passed_on(body)
        time.sleep(faults.seconds * (4 if number % 10 == 0 else 1))
        if is_due and faults.is_lost:
            self.close_connection = True
            return
        is_cut = is_due and faults.is_cut
        if is_due and not is_cut:
            code = "AccessDenied" if self.faults.status in (401, 403) else "SlowDown"
            text = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"
            if self.kind == "gs":
                text = json.dumps({"error": {"code": self.faults.status, "message": code}})
            answer = (
                self.faults.status,
                [("Content-Type", f"application/{'json' if self.kind == 'gs' else 'xml'}")],
                (text.encode()),
            )
        status, headers, data = answer
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if is_cut else data)
        self.close_connection = self.close_connection or is_cut

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request

    def _passed_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        if self.kind == "gs" and not self._condition_holds():
            return 412, [], b'{"error": {"code": 412, "message": "Precondition Failed"}}'
        return self._request(self.command, self.path, body)

    def _condition_holds(self) -> bool:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        if "ifGenerationMatch" not in query:
            return True
        if self.command == "POST":
            path = f"{url.path.removeprefix('/upload')}/{urllib.parse.quote(query['name'], safe='')}"
        elif self.command == "DELETE":
            path = url.path
        else:
            return True
        status, _, data = self._request("GET", path, b"")
        return (json.loads(data)["generation"] if status == 200 else "0") == query["ifGenerationMatch"]

    def _request(self, method: str, path: str, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _OWN_HEADERS}
        connection = http.client.HTTPConnection(self.upstream, timeout=60)
        connection.request(method, path, body, headers)
        found = connection.getresponse()
        data = found.read()
        kept = [(name, value) for name, value in found.getheaders() if name.lower() not in _OWN_HEADERS]
        if method == "HEAD" and (size := found.getheader("Content-Length")):
            kept.append(("X-Content-Length", size))
        connection.close()
        return found.status, kept, data


@contextlib.contextmanager
def proxied(server: Server) -> Iterator[tuple[Server, Faults]]:
    """Run a proxy in front of a server; return it as a server, and its faults, which can be changed."""
    faults = Faults()
    fields = {"upstream": server.endpoint.removeprefix("http://"), "kind": server.scheme, "faults": faults}
    handler = type("Handler", (_Handler,), {**fields, "lock": threading.Lock(), "count": 0})
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
    try:
        yield Server(server.scheme, endpoint, environment(server.scheme, endpoint)), faults
    finally:
        proxy.shutdown()
