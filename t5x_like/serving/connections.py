"""Limits of the server's connections: their number, in all and per client, and the time that each may take.

A connection is half open until its client has sent the headers of a request. When there are too many connections, the
oldest half-open one is closed, of the same client if that has too many; if all are in use, the new one is refused.
"""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

_REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


@dataclasses.dataclass(frozen=True)
class ConnectionLimits:
    """Limits of connections.

    Attributes:
      total: Largest number of open connections.
      per_client: Largest number of open connections from one address.
      header_seconds: Time for the headers of a request, from the opening of the connection or the response before it.
      request_seconds: Time for a request and its response, the client's reading included.
    """

    total: int = 1024
    per_client: int = 256
    header_seconds: float = 10.0
    request_seconds: float = 630.0


def limited_protocol(limits: ConnectionLimits) -> type[asyncio.Protocol]:
    """Return uvicorn's HTTP protocol with limits, for one server."""
    connections: dict[LimitedProtocol, None] = {}

    class LimitedProtocol(H11Protocol):
        timer: asyncio.TimerHandle | None = None
        timed_request: Any = None

        @property
        def is_in_use(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        @property
        def address(self) -> str:
            return self.client[0] if self.client else ""

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)  # type: ignore[arg-type]
            same = [other for other in connections if other.address == self.address]
            crowd = same if len(same) >= limits.per_client else list(connections)
            connections[self] = None
            if len(same) >= limits.per_client or len(connections) > limits.total:
                idle = next((other for other in crowd if not other.is_in_use), None)
                if idle is None:
                    self.transport.write(_REFUSAL)
                    self.transport.close()
                    return
                idle.transport.abort()
                connections.pop(idle, None)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            connections.pop(self, None)
            if self.timer is not None:
                self.timer.cancel()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Start the timer of a request, or of the wait for the headers of the next one, unless it runs already."""
            request = self.cycle if self.is_in_use else None
            if self.timer is not None:
                if request is self.timed_request:
                    return
                self.timer.cancel()
            self.timed_request = request
            seconds = limits.header_seconds if request is None else limits.request_seconds
            self.timer = self.loop.call_later(seconds, self.transport.abort)

    return LimitedProtocol
