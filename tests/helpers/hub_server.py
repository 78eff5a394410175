"""A server of the protocol of the Hugging Face Hub for one data set: its description, its list of files, its files."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_COMMIT = "0" * 40
_MAIN = r"(?:main|" + _COMMIT + ")"


def _handler(repository: str, files: Mapping[str, bytes]) -> type[BaseHTTPRequestHandler]:
    entries = [
        {"type": "file", "path": name, "size": len(data), "oid": f"{index:040x}"}
        for index, (name, data) in enumerate(sorted(files.items()))
    ]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": _COMMIT, **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _json(self, value: Any) -> None:
            self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if re.fullmatch(rf"/api/datasets/{repository}(/revision/{_MAIN})?", path):
                siblings = [{"rfilename": entry["path"]} for entry in entries]
                self._json({"id": repository, "sha": _COMMIT, "private": False, "siblings": siblings})
            elif re.fullmatch(rf"/api/datasets/{repository}/tree/{_MAIN}/?", path):
                self._json(entries)
            elif (found := re.fullmatch(rf"/datasets/{repository}/resolve/{_MAIN}/(.+)", path)) and found[1] in files:
                data, headers = files[found[1]], {"ETag": '"1"', "Accept-Ranges": "bytes"}
                wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if not wanted:
                    self._answer(200, data, headers)
                    return
                start, stop = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
                where = f"bytes {start}-{stop - 1}/{len(data)}"
                self._answer(206, data[start:stop], {**headers, "Content-Range": where})
            else:
                code = "EntryNotFound" if path.startswith(f"/api/datasets/{repository}/") else "RepoNotFound"
                self._answer(404, b"", {"X-Error-Code": code})

        do_HEAD = do_GET

    return Handler


@contextlib.contextmanager
def hub_serving(repository: str, files: Mapping[str, bytes]) -> Iterator[str]:
    """Serve the files of a data set, all in its root, and yield the address for `HF_ENDPOINT`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(repository, files))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
