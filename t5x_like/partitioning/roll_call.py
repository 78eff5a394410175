"""Before jax's own start: process 0 waits at the coordinator's port until every process has said its number.

jax waits in the same way, but ends the process with a C++ trace when somebody does not come, and says of nobody who it
is. Here the processes that are missing are named, in the messages of all that are there; so are two processes with the
same number, and processes that count differently. The port is free again before jax takes it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Mapping
from typing import Any

from t5x_like.config import ConfigError, Problem

_RETRY_SECONDS = 0.2
_PATIENCE_SECONDS = 10.0
"""For which the others wait longer than process 0, which knows who is missing."""
_SHOWN = 20


class RollCallError(Exception):
    """Somebody did not come."""


def roll_call(coordinator: str, index: int, count: int, seconds: float, environment: Mapping[str, str]) -> None:
    """Returns when processes 0 to count - 1 have all called this.

    Args:
      coordinator: "host:port" of process 0.
      index, count: Which process this is, of how many.
      seconds: For which they wait for each other.
      environment: May say in JAX_COORDINATOR_BIND_ADDRESS on which address process 0 listens.

    Raises:
      RollCallError: somebody did not come; the message says who.
      ConfigError: two processes have the same number, or not the same count.
    """
    host, _, port = coordinator.rpartition(":")
    if index == 0:
        bind = environment.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")[0].strip("[]")
        _call(bind, int(port), count, seconds)
    else:
        _answer(host.strip("[]"), int(port), index, count, seconds)


def _call(bind: str, port: int, count: int, seconds: float) -> None:
    """Process 0."""
    deadline = time.monotonic() + seconds
    there: dict[int, socket.socket] = {}
    all_connections: list[socket.socket] = []
    verdict: dict[str, Any] = {"go": True}
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listener(bind, port))
        while len(there) < count - 1 and "go" in verdict:
            listener.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                verdict = {"missing": sorted(set(range(1, count)) - there.keys())}
                break
            stack.enter_context(connection)
            hello = _read(connection, seconds=2.0)
            if hello is None:
                continue
            number = hello.get("index")
            if not isinstance(number, int):
                continue
            if hello.get("count") != count:
                verdict = {"wrong": f"process {number} counts {hello.get('count')} processes, process 0 counts {count}"}
            elif number not in range(1, count) or (number in there and _is_open(there[number])):
                verdict = {"wrong": f"two processes say that they are number {number}"}
            there[number] = connection
            all_connections.append(connection)
        for connection in all_connections:
            with contextlib.suppress(OSError):
                connection.setblocking(True)
                connection.sendall(json.dumps(verdict).encode() + b"\n")
    _judge(verdict, 0, count, seconds)


def _answer(host: str, port: int, index: int, count: int, seconds: float) -> None:
    """The others."""
    deadline = time.monotonic() + seconds
    reason = "no answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=5.0) as connection:
                connection.sendall(json.dumps({"index": index, "count": count}).encode() + b"\n")
                verdict = _read(connection, deadline - time.monotonic() + _PATIENCE_SECONDS)
            if verdict is not None:
                return _judge(verdict, index, count, seconds)
            reason = "it left without a word"
        except (OSError, UnicodeError) as error:
            # The second: no name of a host at all.
            reason = getattr(error, "strerror", None) or str(error)
        time.sleep(_RETRY_SECONDS)
    raise RollCallError(
        f"process {index} of {count} did not reach process 0 at {host}:{port} within {seconds:g} seconds ({reason}): "
        "look at its log, and whether this host reaches it"
    )


def _judge(verdict: Mapping[str, Any], index: int, count: int, seconds: float) -> None:
    if "wrong" in verdict:
        raise ConfigError([Problem("processes", str(verdict["wrong"]), "each number from 0 once, and the same count")])
    if "missing" in verdict:
        names = [str(number) for number in verdict["missing"]]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise RollCallError(
            f"process {index} of {count}: after {seconds:g} seconds these processes had not come: "
            f"{', '.join(names[:_SHOWN])}{more}. Look at their logs, or give them longer: --initialization-timeout"
        )


def _listener(bind: str, port: int) -> socket.socket:
    try:
        if bind:
            family = socket.AF_INET6 if ":" in bind else socket.AF_INET
            return socket.create_server((bind, port), family=family, backlog=1024)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        found = f"port {port} not to be had on this host ({error.strerror or error})"
        raise ConfigError([Problem("coordinator", found, "a port that is free on process 0's host")]) from None


def _read(connection: socket.socket, seconds: float) -> dict[str, Any] | None:
    """The JSON object of one line; None if there comes none."""
    connection.settimeout(seconds)
    try:
        with connection.makefile("rb") as stream:
            line = stream.readline(100_000)
        found = json.loads(line) if line.endswith(b"\n") else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _is_open(connection: socket.socket) -> bool:
    """Whether its process is still there; one that was started again has left a closed one."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
