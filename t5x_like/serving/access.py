"""Access to the server: API keys, and the Host and Origin of requests.

A web page can make its visitor's browser send requests to a server on the visitor's machine. Its requests carry the
page's name as their Host (DNS rebinding) or Origin, and are refused.
"""

from __future__ import annotations

import dataclasses
import hmac
import ipaddress
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse

from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.serving import response_forms

API_KEY_VARIABLE = "T5X_LIKE_API_KEY"
OPEN_PATHS = ("/health",)
"""Paths that load balancers ask for, by address and without a key."""


@dataclasses.dataclass(frozen=True)
class AccessRules:
    """Rules of access.

    Attributes:
      keys: API keys, one of which a request must have; empty: none is needed.
      hosts: Names by which clients may address the server, beside its addresses.
    """

    keys: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    hosts: tuple[str, ...] = ("localhost",)


def read_keys(path: Path | None) -> tuple[str, ...]:
    """Return the API keys of a file, one per line, or else of the environment variable T5X_LIKE_API_KEY.

    Raises:
      ConfigError: the file cannot be read, or has no key.
    """
    if path is None:
        key = os.environ.get(API_KEY_VARIABLE, "").strip()
        return (key,) if key else ()
    try:
        keys = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise ConfigError([ConfigProblem("--api-key", f"{path}: {error}", "a file of keys, one per line")]) from None
    if not keys:
        raise ConfigError([ConfigProblem("--api-key", f"no key in {path}", "a file of keys, one per line")])
    return keys


def own_names(host: str, further: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names by which clients may address a server that listens on `host`."""
    return tuple(name.lower() for name in ("localhost", host, socket.gethostname(), *further))


class AccessControl:
    """ASGI middleware that refuses requests, and names the client of the others in `scope["client_name"]`."""

    def __init__(self, app: Any, rules: AccessRules):
        self._app = app
        self._rules = rules

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            refusal = self._refusal(headers)
            if refusal is not None:
                status, message = refusal
                more = {"www-authenticate": "Bearer"} if status == 401 else None
                await JSONResponse(response_forms.error_body(message, status), status, more)(scope, receive, send)
                return
            # Clients behind one proxy have its address, but keys of their own.
            address = scope["client"][0] if scope.get("client") else ""
            scope["client_name"] = _key(headers) if self._rules.keys else address
        await self._app(scope, receive, send)

    def _refusal(self, headers: Mapping[str, str]) -> tuple[int, str] | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_own(host):
            return 421, f"the Host {host!r} is not a name of this server; its operator can add it by --allowed-host"
        if origin is not None and not self._is_own(origin.partition("://")[2]):
            return 403, f"requests of web pages from {origin!r} are not allowed"
        found = _key(headers).encode()
        # Every key is compared, so that the time does not tell which one is similar.
        if self._rules.keys and not sum(hmac.compare_digest(found, key.encode()) for key in self._rules.keys):
            return 401, "found no valid API key, expected the header Authorization: Bearer KEY"
        return None

    def _is_own(self, authority: str) -> bool:
        """Return whether an authority (`name:port`) names this server; addresses do, since pages have names."""
        name = authority.lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        if name in self._rules.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _key(headers: Mapping[str, str]) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
