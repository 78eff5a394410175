"""Access to the server, and that neither half-open connections nor one client's requests exclude other clients."""

from __future__ import annotations

import collections
import dataclasses
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from t5x_like.config import TokenizerConfig
from t5x_like.data.tokenizers.loading import load_tokenizer
from t5x_like.decoding.fair_queue import FairQueue
from t5x_like.errors import ConfigError

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

LIMITS = (20, 12)


class IdleBatcher:
    """A batcher that never answers, with the counts of one."""

    failure = None
    num_active = num_waiting = 0
    scores_prompts = True
    fills_gaps = unmasks = False

    def __init__(self) -> None:
        from t5x_like.decoding.continuous_batching import BatcherConfig

        self.config = BatcherConfig(slots=2, max_prompt_length=8, max_new_tokens=8)
        self.clients: list[str] = []

    def num_waiting_of(self, client: str) -> int:
        return self.clients.count(client)

    def submit_all(self, requests: list[Any]) -> None:
        self.clients += [request.client for request in requests]
        for request in requests:
            request.on_tokens([], "stop")

    def cancel(self, request: Any) -> None:
        pass


@dataclasses.dataclass
class Running:
    port: int
    batcher: IdleBatcher

    def ask(self, method: str = "GET", path: str = "/v1/models", body: str | None = None, **headers: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, names)
        return connection.getresponse().status


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    from t5x_like.serving.access import AccessRules
    from t5x_like.serving.app import make_app
    from t5x_like.serving.connections import ConnectionLimits, limited_protocol
    from t5x_like.serving.service import Service

    batcher: Any = IdleBatcher()
    tokenizer = load_tokenizer(TokenizerConfig(kind="bytes", num_sentinels=0), None)
    service = Service("m", batcher, lambda text: [1], tokenizer, 10, max_waiting_per_client=4, body_seconds=2)
    app = make_app(service, AccessRules(("first key", "second"), ("localhost", "models.example")))
    protocol = limited_protocol(ConnectionLimits(*LIMITS, header_seconds=2, request_seconds=30))
    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    running = uvicorn.Server(uvicorn.Config(app, http=protocol, log_level="critical", proxy_headers=False))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield Running(listening.getsockname()[1], batcher)
    running.should_exit = True
    thread.join(timeout=60)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer first key"}, 200),
        ({"Authorization": "bearer  first key", "Host": "models.example:80"}, 200),
        ({"Authorization": "Bearer first key", "Origin": "http://localhost:3000"}, 200),
        ({}, 401),
        ({"Authorization": "Bearer first"}, 401),
        ({"Authorization": "first key"}, 401),
        ({"Authorization": "Bearer first key", "Host": "page.example"}, 421),
        ({"Authorization": "Bearer first key", "Host": "127.0.0.1.page.example"}, 421),
        ({"Authorization": "Bearer first key", "Origin": "https://page.example"}, 403),
        ({"Authorization": "Bearer first key", "Origin": "null"}, 403),
    ],
)
def test_key_host_and_origin(server: Running, headers: dict[str, str], status: int) -> None:
    assert server.ask(**headers) == status
    assert server.ask(path="/health", Host="page.example") == 200, "a load balancer asks by address, without a key"


def test_keys_are_read_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from t5x_like.serving.access import API_KEY_VARIABLE, AccessRules, read_keys

    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    assert read_keys(file) == ("one", "two") and read_keys(None) == ()
    monkeypatch.setenv(API_KEY_VARIABLE, "three")
    assert read_keys(None) == ("three",) and "three" not in repr(AccessRules(("three",)))
    file.write_text("\n")
    for path in (file, tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="--api-key"):
            read_keys(path)


@pytest.mark.parametrize("count", [100, pytest.param(400, marks=pytest.mark.slow)])
def test_half_open_connections_do_not_keep_others_out_and_are_closed(server: Running, count: int) -> None:
    half_open = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(count)]
    for connection in half_open[: count // 2]:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
    key = {"Authorization": "Bearer first key"}
    assert [server.ask(**key) for _ in range(5)] == [200] * 5
    for connection in half_open:
        connection.settimeout(120)
        try:
            assert connection.recv(1) == b""
        except ConnectionResetError:
            pass
        connection.close()


def test_headers_that_trickle_and_a_body_that_stops_are_ended(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(120)
        with pytest.raises(OSError):
            for _ in range(200):
                connection.sendall(b"GET" if _ == 0 else b" ")
                time.sleep(0.05)
            raise AssertionError("the connection is still open")
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(120)
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer first key\r\nContent-Length: 9"
        )
        connection.sendall(f"{head}\r\n\r\n{{".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


def test_one_client_cannot_fill_the_queue(server: Running) -> None:
    body = '{"prompt": ["a", "b", "c"]}'
    statuses = [server.ask("POST", "/v1/completions", body, Authorization="Bearer first key") for _ in range(3)]
    assert statuses == [200, 200, 429]
    assert server.ask("POST", "/v1/completions", body, Authorization="Bearer second") == 200
    assert set(server.batcher.clients) == {"first key", "second"}


@dataclasses.dataclass(eq=False)
class Item:
    client: str
    number: int


def test_clients_are_served_in_turn_and_those_without_slots_first() -> None:
    queue: FairQueue[Item] = FairQueue()
    many = [Item("many", number) for number in range(5)]
    few = [Item("few", number) for number in range(2)]
    queue.extend(many)
    queue.extend(few)
    assert len(queue) == 7 and queue.count("few") == 2 and queue.count("none") == 0
    queue.remove(many[1])
    active: collections.Counter[str] = collections.Counter({"many": 2})
    order = []
    while queue:
        item = queue.pop(active)
        active[item.client] += 1
        order.append((item.client, item.number))
    assert order == [("few", 0), ("few", 1), ("many", 0), ("many", 2), ("many", 3), ("many", 4)]
