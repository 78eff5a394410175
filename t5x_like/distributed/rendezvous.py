"""Pre-initialization barrier: process 0 waits at the coordinator's port until all processes have connected.

jax waits in the same way. But if a process does not connect, jax aborts the others from C++ with a stack trace, without
an exception that Python could translate into our exit codes, and does not say which process is missing. With many hosts
that is the first question. This barrier names the missing processes in the message of every process that connected, and
refuses two processes with the same index and processes with different counts. It closes the port before jax opens it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import time
from collections.abc import Mapping
from typing import Any

from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.utils.json_reader import parse_json

_RETRY_SECONDS = 0.2
_EXTRA_SECONDS = 10.0
"""Additional time for which the others wait, because process 0 knows which processes are missing."""
_ANSWER_SECONDS = 5.0
"""Time for the answer to a process that has connected."""
_MAX_LISTED = 20


class RendezvousError(Exception):
    """Some processes did not connect in time, or process 0 cannot listen at present."""


def rendezvous(coordinator: str, index: int, count: int, seconds: float, environment: Mapping[str, str]) -> None:
    """Return when processes 0 to count - 1 have all called this.

    Args:
      coordinator: "host:port" of process 0.
      index: Index of this process.
      count: Number of processes.
      seconds: Timeout.
      environment: JAX_COORDINATOR_BIND_ADDRESS may give the address on which process 0 listens.

    Raises:
      RendezvousError: Some processes did not connect, which the message names, or the port of process 0 is taken.
      ConfigError: Two processes have the same index, or different counts.
    """
    host, _, port = coordinator.rpartition(":")
    if index == 0:
        bind = environment.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")[0].strip("[]")
        _serve(bind, int(port), count, seconds)
    else:
        _connect(host.strip("[]"), int(port), index, count, seconds)


def _serve(bind: str, port: int, count: int, seconds: float) -> None:
    """Wait for the other processes in process 0, and send the result to all that have connected."""
    deadline = time.monotonic() + seconds
    connected: dict[int, socket.socket] = {}
    all_connections: list[socket.socket] = []
    verdict: dict[str, Any] = {"go": True}
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listener(bind, port))
        while len(connected) < count - 1 and "go" in verdict:
            listener.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                verdict = {"missing": sorted(set(range(1, count)) - connected.keys())}
                break
            stack.enter_context(connection)
            hello = _read(connection, seconds=2.0)
            if hello is None:
                continue
            index = hello.get("index")
            if not isinstance(index, int):
                continue
            if hello.get("count") != count:
                other = hello.get("count")
                verdict = {"wrong": f"process {index} has a process count of {other}, process 0 of {count}"}
            elif index not in range(1, count) or (index in connected and _is_open(connected[index])):
                verdict = {"wrong": f"two processes with index {index}"}
            connected[index] = connection
            all_connections.append(connection)
        for connection in all_connections:
            with contextlib.suppress(OSError):
                connection.settimeout(_ANSWER_SECONDS)
                connection.sendall(json.dumps(verdict).encode() + b"\n")
    _raise_for(verdict, 0, count, seconds)


def _connect(host: str, port: int, index: int, count: int, seconds: float) -> None:
    """Connect to process 0 from another process and wait for the result."""
    deadline = time.monotonic() + seconds
    reason = "no answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=5.0) as connection:
                connection.sendall(json.dumps({"index": index, "count": count}).encode() + b"\n")
                verdict = _read(connection, deadline - time.monotonic() + _EXTRA_SECONDS)
            if verdict is not None:
                return _raise_for(verdict, index, count, seconds)
            reason = "it closed the connection"
        except (OSError, UnicodeError) as error:
            # UnicodeError: the text is not a valid host name.
            reason = getattr(error, "strerror", None) or str(error)
        time.sleep(_RETRY_SECONDS)
    raise RendezvousError(
        f"process {index} of {count} could not connect to process 0 at {host}:{port} within {seconds:g} seconds "
        f"({reason}): check its log, and the network between the hosts"
    )


def _raise_for(verdict: Mapping[str, Any], index: int, count: int, seconds: float) -> None:
    """Raise the error of a result; return if all processes have connected."""
    if "wrong" in verdict:
        expected = "each index from 0 once, and the same process count"
        raise ConfigError([ConfigProblem("processes", str(verdict["wrong"]), expected)])
    if "missing" in verdict:
        names = [str(number) for number in verdict["missing"]]
        more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
        raise RendezvousError(
            f"process {index} of {count}: after {seconds:g} seconds these processes had not connected: "
            f"{', '.join(names[:_MAX_LISTED])}{more}. Check their logs, or increase --initialization-timeout"
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
        if error.errno == errno.EADDRINUSE:
            # A process of an earlier start may still be ending, and `launch local` chooses another port at a restart.
            raise RendezvousError(
                f"process 0 cannot listen on port {port}: address already in use. If the same command fails again, end "
                "the program that uses it, or choose another port"
            ) from None
        found = f"cannot bind port {port}: {(error.strerror or str(error)).lower()}"
        raise ConfigError([ConfigProblem("coordinator", found, "a free port on the host of process 0")]) from None


def _read(connection: socket.socket, seconds: float) -> dict[str, Any] | None:
    """Return the JSON object of one line; None if none arrives."""
    connection.settimeout(seconds)
    try:
        with connection.makefile("rb") as stream:
            line = stream.readline(100_000)
        message = parse_json(line) if line.endswith(b"\n") else None
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None


def _is_open(connection: socket.socket) -> bool:
    """Return whether the process still holds the connection; a process that was restarted has closed its first one."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
