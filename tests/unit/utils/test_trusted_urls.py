"""Requests are sent only to URLs that the user has named, and no URL is taken for the name of a folder."""

from __future__ import annotations

import dataclasses
import http.server
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.config_examples import changed, example
from helpers.data_examples import text_store

from t5x_like import api
from t5x_like.cli.main import main
from t5x_like.config.serialization import to_json
from t5x_like.config.validation import validate
from t5x_like.data.sources.file_access import match_files
from t5x_like.errors import EXIT_REFUSED, EXIT_USAGE, ConfigError, DataError, SafetyError
from t5x_like.storage import locations
from t5x_like.utils import trusted_urls


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trusted_urls, "_noted", set())
    monkeypatch.setattr(trusted_urls, "_trusted", set())


@pytest.fixture
def listener() -> Iterator[tuple[int, list[bytes]]]:
    """Start a server that accepts connections, records them, and never answers."""
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            open_connections = []
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                open_connections.append(connection)
                seen.append(b"a connection")

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1], seen
        server.shutdown(socket.SHUT_RDWR)


ARGUMENTS = [
    ["train", "smoke", "--workdir", "http://host/run"],
    ["eval", "hf://org/run"],
    ["train", "gs://bucket/config.json"],
    ["train", "from:hf://org/model"],
    ["doctor", "ftp://host/run"],
    ["generate", "runs/x", "--prompt", "a", "--output", "ftp://host/out.jsonl"],
    ["export", "runs/x", "http://host/out"],
    ["convert", "--from", "hf", "model", "hf://org/out"],
    ["plan", "smoke", "--save", "http://host/plan.json"],
    ["inspect", "smoke", "--output", "http://host/page.html"],
    ["train", "smoke", "--print-config", "--data.tokenizer.path", "http://host/spiece.model"],
    ["train", "smoke", "--print-config", "--data.store-dir", "http://host/stores"],
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=" ".join)
def test_url_in_place_of_a_path_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == EXIT_USAGE
    assert "://" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_url_of_another_service_is_refused_in_python() -> None:
    with pytest.raises(ConfigError, match="a path, or a URL of gs://, s3://"):
        api.train("smoke", workdir="http://bucket/run")
    with pytest.raises(ConfigError, match="local path"):
        api.train("smoke", workdir="runs/smoke", plan="s3://bucket/plan.json")
    run = changed(example(), "data.tokenizer", dataclasses.replace(example().data.tokenizer, path="http://host/x"))
    assert any(problem.where == "data.tokenizer.path" for problem in validate(run))


@pytest.mark.parametrize("field", ["data.store_dir", "data.corpus"])
def test_configuration_of_others_sends_no_request(
    tmp_path: Path,
    listener: tuple[int, list[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    field: str,
) -> None:
    port, seen = listener
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(locations, "REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(locations, "_ANSWERED", set())
    run = example()
    url = "s3://bucket/stores"
    if field == "data.corpus":
        url = "s3://bucket/*.jsonl"
        run = changed(run, field, dataclasses.replace(run.data.corpus, files=(url,), packages=False))
    else:
        run = changed(run, field, url)
    config = tmp_path / "config.json"
    config.write_text(to_json(run))
    assert main(["inspect", str(config)]) == EXIT_REFUSED
    assert f"--trust {url}" in capsys.readouterr().err and not seen
    if field == "data.store_dir":
        assert main(["inspect", str(config), "--trust", url]) == EXIT_USAGE
        assert "did not answer for 0.5 s" in capsys.readouterr().err and seen


@pytest.mark.parametrize(
    "url", ["http://host/x", "https://host/x", "ftp://h/x", "s3://b/x|zip:", "s3://a/b::http://c", "s3:///x"]
)
def test_other_schemes_and_combinations_of_urls_are_refused(url: str) -> None:
    for read in (locations.location, lambda text: match_files([text])):
        if url == "s3:///x" and read is not locations.location:
            continue
        with pytest.raises((ConfigError, DataError)):
            locations.children(read(url))


def test_trust_covers_only_paths_below_the_url() -> None:
    trusted_urls.note({"a": [{"b": "s3://bucket/x"}, "s3://bucket/xyz", "memory://x"]})
    trusted_urls.trust(["s3://bucket/x/"])
    trusted_urls.require_trusted("s3://bucket/x", ("s3",), "a")
    trusted_urls.require_trusted("s3://bucket/x/store", ("s3",), "a")
    trusted_urls.require_trusted("s3://named-by-nobody-in-json", ("s3",), "a")
    with pytest.raises(SafetyError, match="--trust s3://bucket/xyz"):
        trusted_urls.require_trusted("s3://bucket/xyz", ("s3",), "a")


class _S3(http.server.BaseHTTPRequestHandler):
    """The part of S3's interface that stores need."""

    objects: dict[str, bytes] = {}

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", send_body: bool = True) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(body):x}"')
        self.send_header("x-amz-bucket-region", "us-east-1")
        self.end_headers()
        if send_body:
            self.wfile.write(body)

    def do_PUT(self) -> None:
        self.objects[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200)

    def do_GET(self) -> None:
        if "list-type=2" in self.path:
            keys = sorted(path.removeprefix("/bucket/") for path in self.objects)
            items = "".join(f"<Contents><Key>{key}</Key><Size>1</Size></Contents>" for key in keys)
            listing = f"<ListBucketResult><KeyCount>{len(keys)}</KeyCount><IsTruncated>false</IsTruncated>{items}"
            self._answer(200, f"{listing}</ListBucketResult>".encode())
            return
        data = self.objects.get(self.path)
        if data is not None and (span := self.headers.get("Range")):
            first, _, last = span.removeprefix("bytes=").partition("-")
            data = data[int(first or len(data) - int(last)) : int(last) + 1 if first and last else None]
            self._answer(206, data)
            return
        self._answer(404 if data is None else 200, data or b"")

    def do_HEAD(self) -> None:
        self._answer(200 if self.path in (*self.objects, "/bucket") else 404, send_body=False)

    def do_DELETE(self) -> None:
        self.objects.pop(self.path, None)
        self._answer(204)


@pytest.mark.parametrize("by", ["environment", "URL"])
def test_service_with_the_interface_of_s3_is_reached_by_its_endpoint(monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _S3)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    try:
        if by == "environment":
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            where = locations.location("s3://bucket/environment")
        else:
            where = locations.location(f"s3://bucket/url?endpoint={endpoint}")
        assert locations.location(str(where / "x")) == where / "x", "workers get the location as text"
        locations.write_bytes(where / "one", b"12")
        assert locations.read_bytes(where / "one") == b"12" and locations.read_bytes(where / "none") is None
    finally:
        server.shutdown()


def test_store_in_memory_is_unaffected(tmp_path: Path) -> None:
    trusted_urls.note({"store_dir": "memory://x"})
    where = locations.location(f"memory://{tmp_path.name}/s")
    text_store(where, ["a"])  # type: ignore[arg-type]
    assert locations.children(where)
