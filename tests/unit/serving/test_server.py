"""The end of the server: a failure of the decoding ends it, and is the error of the command."""

from __future__ import annotations

import socket
import threading
from typing import Any

import jax
import pytest

from t5x_like.errors import EXIT_OK
from t5x_like.serving import server


class Batcher:
    """A batcher whose decoding ends at once, by an error or by `close`."""

    def __init__(self, failure: BaseException | None) -> None:
        self.failure: BaseException | None = None
        self._fails_by = failure
        self._closed = threading.Event()

    def run(self) -> None:
        if self._fails_by is not None:
            self.failure = self._fails_by
            raise self._fails_by
        self._closed.wait(60)

    def close(self) -> None:
        self._closed.set()


class Server:
    """A server that serves until it is told to end, or receives a signal."""

    def __init__(self, *, signalled: bool) -> None:
        self._signalled = signalled
        self._ended = threading.Event()

    @property
    def should_exit(self) -> bool:
        return self._ended.is_set()

    @should_exit.setter
    def should_exit(self, value: bool) -> None:
        assert value
        self._ended.set()

    def run(self, sockets: list[Any]) -> None:
        assert self._signalled or self._ended.wait(60)


def run(failure: BaseException | None) -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return server._run(Server(signalled=failure is None), listening, Batcher(failure))  # type: ignore[arg-type]


@pytest.mark.parametrize("failure", [jax.errors.JaxRuntimeError("INTERNAL: Core halted unexpectedly"), KeyError("a")])
def test_failure_of_the_decoding_is_raised(failure: Exception) -> None:
    with pytest.raises(type(failure)) as caught:
        run(failure)
    assert caught.value is failure


def test_a_signal_ends_the_server_without_an_error() -> None:
    assert run(None) == EXIT_OK
