"""Files and directories of commands in object stores: when they are read and written, and what an error leaves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from t5x_like.errors import ConfigError, SafetyError
from t5x_like.storage import locations, transfers
from t5x_like.storage.locations import Url, location
from t5x_like.storage.transfers import input_file, output_directory, output_file, transferred


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Url]:
    monkeypatch.setattr(transfers, "_TRANSFERS", {})
    monkeypatch.setattr(transfers, "UPLOAD_SECONDS", 0.02)
    url = location(f"memory://{tmp_path.name}/transfers")
    assert isinstance(url, Url)
    yield url
    locations.remove(url)


def test_input_is_downloaded_and_output_uploaded(url: Url, capsys: pytest.CaptureFixture[str]) -> None:
    locations.write_bytes(url / "in.jsonl", b"prompt")
    source, target = input_file(f"{url}/in.jsonl", "--input"), output_file(f"{url}/deep/out.json", "--output")
    assert not source.exists() and source.name == "in.jsonl" and target.name == "out.json"
    with transferred([source, target, Path("local")]):
        assert source.read_bytes() == b"prompt"
        target.write_bytes(b"result")
        (target.parent / "out.json.rows").mkdir()
        (target.parent / "out.json.rows" / "1.jsonl").write_bytes(b"row")
        (target.parent / "out.json.partial").write_bytes(b"not this")
        assert locations.keys(url) == ["in.jsonl"]
    assert locations.keys(url) == ["deep/out.json", "deep/out.json.rows/1.jsonl", "in.jsonl"]
    assert locations.read_bytes(url / "deep" / "out.json") == b"result"
    assert f"{url}/deep/out.json: uploaded, 2 files" in capsys.readouterr().err


def test_missing_input_and_occupied_directory_are_refused_before_the_command(url: Url) -> None:
    with pytest.raises(ConfigError, match="no such object"), transferred([input_file(f"{url}/none", "--input")]):
        raise AssertionError
    locations.write_bytes(url / "model" / "config.json", b"{}")
    with pytest.raises(ConfigError, match="a URL with objects"), transferred([output_directory(f"{url}/model", "OUT")]):
        raise AssertionError
    with pytest.raises(ConfigError, match="gs://BUCKET/PATH"):
        output_file("gs://bucket", "--output")


def test_description_of_a_directory_is_uploaded_last(url: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    order, write = [], locations.write_bytes

    def recorded(path: Url, content: bytes) -> None:
        order.append(str(path).removeprefix(f"{url}/"))
        write(path, content)

    monkeypatch.setattr(locations, "write_bytes", recorded)
    out = output_directory(f"{url}/model", "OUT")
    with transferred([out]):
        for name in ("config.json", "model.json", "checkpoints/0/x", "huggingface/config.json"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(b"1")
    assert sorted(order[:2]) == ["model/checkpoints/0/x", "model/huggingface/config.json"]
    assert order[2:] == ["model/model.json", "model/config.json"]


def test_failed_command_writes_no_directory(url: Url) -> None:
    out = output_directory(f"{url}/model", "OUT")
    with pytest.raises(SafetyError), transferred([out]):
        out.mkdir()
        (out / "config.json").write_bytes(b"{}")
        raise SafetyError("the model is damaged")
    assert locations.keys(url) == []


def test_lines_are_uploaded_while_they_are_written_and_continued(url: Url) -> None:
    def wait_for(expected: bytes) -> None:
        deadline = time.monotonic() + 120
        while locations.read_bytes(url / "out.jsonl") != expected and time.monotonic() < deadline:
            time.sleep(0.01)
        assert locations.read_bytes(url / "out.jsonl") == expected

    def lines() -> Path:
        return output_file(f"{url}/out.jsonl", "--output", is_continued=True)

    first = lines()
    with pytest.raises(SafetyError), transferred([first]):
        first.with_name("out.jsonl.settings.json").write_bytes(b"{}")
        first.write_bytes(b"1\n")
        wait_for(b"1\n")
        assert locations.read_bytes(url / "out.jsonl.settings.json") == b"{}"
        first.write_bytes(b"1\n2\n")
        raise SafetyError("out of memory")
    wait_for(b"1\n2\n")
    second = lines()
    with transferred([second]):
        assert second != first and second.read_bytes() == b"1\n2\n"
        assert second.with_name("out.jsonl.settings.json").read_bytes() == b"{}"
        with second.open("ab") as file:
            file.write(b"3\n")
    assert locations.read_bytes(url / "out.jsonl") == b"1\n2\n3\n"


def test_output_that_cannot_be_uploaded_stays(
    url: Url, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Url, content: bytes) -> None:
        raise SafetyError("the bucket may not be written")

    monkeypatch.setattr(locations, "write_bytes", fail)
    out = output_file(f"{url}/page.html", "--output")
    with pytest.raises(SafetyError, match="may not be written"), transferred([out]):
        out.write_bytes(b"page")
    assert f"the output stays in {out}" in capsys.readouterr().err and out.read_bytes() == b"page"
