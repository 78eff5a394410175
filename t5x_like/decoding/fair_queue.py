"""Queue of requests that serves clients in turn, so that one client's many requests do not delay another's few."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, Protocol, TypeVar


class _HasClient(Protocol):
    @property
    def client(self) -> str: ...


RequestT = TypeVar("RequestT", bound=_HasClient)


class FairQueue(Generic[RequestT]):
    """Requests by client, each client's in the order of their arrival. Not safe for several threads."""

    def __init__(self) -> None:
        self._by_client: dict[str, collections.deque[RequestT]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_client.values()))

    def __iter__(self) -> Iterator[RequestT]:
        return (request for waiting in self._by_client.values() for request in waiting)

    def count(self, client: str) -> int:
        """Return the number of requests of a client."""
        return len(self._by_client.get(client, ()))

    def extend(self, requests: Iterable[RequestT]) -> None:
        for request in requests:
            self._by_client.setdefault(request.client, collections.deque()).append(request)

    def remove(self, request: RequestT) -> None:
        """Remove a request; raise KeyError or ValueError if it is not in the queue."""
        self._by_client[request.client].remove(request)
        self._drop_if_empty(request.client)

    def pop(self, active: Mapping[str, int]) -> RequestT:
        """Remove and return the next request: of the client with the fewest active requests; among equals, of the one
        that has waited longest for its turn.

        Args:
          active: Number of active requests by client.
        """
        # A dict keeps the order of insertion and `min` takes the first of equals: the client that has waited longest.
        client = min(self._by_client, key=lambda name: active.get(name, 0))
        waiting = self._by_client.pop(client)
        request = waiting.popleft()
        if waiting:
            self._by_client[client] = waiting  # Behind all others.
        return request

    def clear(self) -> None:
        self._by_client.clear()

    def _drop_if_empty(self, client: str) -> None:
        if not self._by_client[client]:
            del self._by_client[client]
