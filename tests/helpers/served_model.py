"""The server of `t5x-like serve`, in a thread of the test."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import uvicorn

from t5x_like.serving import server


@contextlib.contextmanager
def served(directory: Path, **options: Any) -> Iterator[str]:
    """Serve a model as `serve_model` does, and yield the printed address without its path; then end the server."""
    printed: queue.Queue[str] = queue.Queue()
    servers: list[uvicorn.Server] = []
    codes: list[int] = []

    class Recorded(uvicorn.Server):
        def __init__(self, config: uvicorn.Config):
            super().__init__(config)
            servers.append(self)

    def run() -> None:
        try:
            codes.append(server.serve_model(directory, port=0, **options))
        finally:
            printed.put("ended")

    with (
        mock.patch.object(uvicorn, "Server", Recorded),
        mock.patch.object(server, "say", lambda text, **_: printed.put(text)),
    ):
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        text = ""
        while not text.startswith("http://"):
            text = printed.get(timeout=300)
            assert text != "ended", "the server ended before it printed its address"
        try:
            yield text.removesuffix("/v1/completions")
        finally:
            servers[0].should_exit = True
            thread.join(timeout=60)
    assert codes == [0]
