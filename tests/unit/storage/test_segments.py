"""Files that grow are written in segments: what a reader joins, what is written, and what a kill leaves."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from t5x_like.errors import EXIT_RESUMABLE
from t5x_like.faults import FaultError
from t5x_like.storage import locations, segments
from t5x_like.storage.locations import Url, location
from t5x_like.storage.segments import Segment

NAME = "metrics.jsonl"


class Killed(BaseException):
    """The process is killed."""


@pytest.fixture
def url(tmp_path: Path) -> Iterator[Url]:
    url = location(f"memory://{tmp_path.name}/segments")
    assert isinstance(url, Url)
    yield url
    locations.remove(url)


def upload(url: Url, data: bytes, *, is_whole: bool = False, known: list[Segment] | None = None) -> list[Segment]:
    """Upload as a process does that has downloaded the file, or that knows its segments."""
    stale: list[int] = []
    if known is None:
        _, known, stale = segments.read(url, NAME, segments.listed(url, NAME))
    return segments.upload(url, NAME, data, known, stale, is_whole=is_whole)


def test_growing_file_has_few_segments_and_is_rewritten_seldom(url: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    written, rng, data, known = 0, random.Random(1), b"", []
    write = locations.write_bytes

    def counted(path: Url, content: bytes) -> None:
        nonlocal written
        written += len(content)
        write(path, content)

    monkeypatch.setattr(locations, "write_bytes", counted)
    for number in range(300):
        data += rng.randbytes(rng.randint(1, 40))
        known = upload(url, data, known=known)
        if number % 20 == 0:
            assert segments.read_file(url, NAME) == data
    limit = math.log2(len(data)) + 1
    assert segments.read_file(url, NAME) == data and len(known) <= limit
    assert len(segments.listed(url, NAME)) == len(known) - 1
    assert written <= limit * len(data), "each time, all of it would be 150 times its size"
    # A single object stays at the end.
    assert len(upload(url, data, is_whole=True, known=known)) == 1
    assert locations.keys(url) == [NAME] and segments.read_file(url, NAME) == data


def test_cut_file_loses_what_was_after_the_cut(url: Url) -> None:
    rng = random.Random(2)
    data, known = b"", []
    for _ in range(200):
        if data and rng.random() < 0.2:
            data = data[: rng.randrange(len(data))]
        data += rng.randbytes(rng.randint(0, 30))
        known = upload(url, data, known=known if rng.random() < 0.7 else None)
        assert segments.read_file(url, NAME) == data
        assert len(known) <= math.log2(max(len(data), 2)) + 2


@pytest.mark.parametrize("change", ["grow", "cut", "replace", "whole"])
def test_kill_at_any_request_leaves_a_beginning_of_the_file(
    url: Url, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    rng = random.Random(3)
    pieces = [rng.randbytes(size) for size in (60, 25, 12, 5, 2)]
    before = b"".join(pieces)
    after = {
        "grow": before + rng.randbytes(9),
        "cut": before[:70] + rng.randbytes(50),
        "replace": rng.randbytes(30),
        "whole": before + b"x",
    }[change]
    requests = {name: getattr(locations, name) for name in ("write_bytes", "remove_key")}
    for allowed in range(20):
        locations.remove(url)
        known: list[Segment] = []
        for end in range(1, len(pieces) + 1):
            known = upload(url, b"".join(pieces[:end]), known=known)
        left = allowed

        def dying(name: str) -> Any:
            def request(*arguments: Any) -> None:
                nonlocal left
                if not left:
                    raise Killed
                left -= 1
                requests[name](*arguments)

            return request

        with monkeypatch.context() as patched:
            for name in requests:
                patched.setattr(locations, name, dying(name))
            try:
                upload(url, after, is_whole=change == "whole", known=known)
                is_killed = False
            except Killed:
                is_killed = True
        found = segments.read_file(url, NAME)
        assert found is not None and (before.startswith(found) or after.startswith(found)), allowed
        # The next process downloads what is there, and goes on.
        upload(url, after)
        assert segments.read_file(url, NAME) == after
        if not is_killed:
            return
    raise AssertionError("the upload needs more requests than were allowed")


def test_reader_with_an_old_list_of_segments_reads_all(url: Url) -> None:
    data, known = b"", []
    for size in (64, 16, 4):
        data += bytes(size)
        known = upload(url, data, known=known)
    listed = segments.listed(url, NAME)
    assert len(listed) == 2
    data += b"1" * 40
    upload(url, data, known=known)
    assert segments.read(url, NAME, listed)[0] == data


def test_reader_transfers_only_what_has_changed_since(url: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, known = random.Random(4), []
    data = b""
    for size in (400, 90, 20):
        data += rng.randbytes(size)
        known = upload(url, data, known=known)
    content, found, _ = segments.read(url, NAME, segments.listed(url, NAME))
    transferred = 0

    def counted(request: Any) -> Any:
        def read(*arguments: Any) -> Any:
            nonlocal transferred
            answer = request(*arguments)
            transferred += len(answer[0] or b"") if answer else 0
            return answer

        return read

    for name in ("read_key", "read_key_if_changed"):
        monkeypatch.setattr(locations, name, counted(getattr(locations, name)))
    changes = {data + b"added": 5, data + b"added" + bytes(40): 65, data[:450] + b"after a cut": 61}
    for changed, limit in changes.items():
        transferred = 0
        known = upload(url, changed, known=known)
        content, found, stale = segments.read(url, NAME, segments.listed(url, NAME), content or b"", found)
        assert (content, stale) == (changed, []) and transferred <= limit


def test_segments_that_do_not_join_are_reported(
    url: Url, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    locations.write_bytes(url / NAME, b"0123")
    locations.write_bytes(url / f"segments/{NAME}/{9:015d}", b"9")
    assert segments.read_file(url, NAME) == b"0123"
    assert "found no segment at byte 4, expected one before byte 9" in caplog.text
    monkeypatch.setattr(segments, "listed", lambda *names: [4])
    with pytest.raises(FaultError, match="replaced while they were read, 3 times in a row") as error:
        segments.read_file(url, NAME)
    assert error.value.exit_code == EXIT_RESUMABLE


def test_keys_are_grouped_by_file() -> None:
    keys = ["a.txt", "segments/a.txt/000000000000007", "segments/x/b.jsonl/12", "segments/a.txt/3", "segments/odd"]
    assert segments.grouped(keys) == {"a.txt": [3, 7], "x/b.jsonl": [12]}
