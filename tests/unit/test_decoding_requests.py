"""Prompts are read line by line, as often as needed, or refused by the line."""

import io
import json
import os
import threading

import pytest

from t5x_like.config import DataError
from t5x_like.decoding.requests import Request, open_requests


def read(tmp_path, text, name="prompts.txt"):
    (tmp_path / name).write_bytes(text.encode())
    with open_requests(tmp_path / name) as requests:
        digest = requests.check()
        found = list(requests)
        assert list(requests) == found and digest.rows == len(found)
        return found


def test_lines_of_text_are_prompts(tmp_path):
    assert read(tmp_path, "one\n\n  two\u2028still two \r\nthree") == [
        Request("one", {}),
        Request("  two\u2028still two ", {}),
        Request("three", {}),
    ]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.txt"])
def test_lines_of_json_keep_their_other_fields(tmp_path, name):
    found = read(tmp_path, '\ufeff{"prompt": "a\\nb", "id": 7}\n\n{"prompt": "", "seed": 0, "choices": ["x"]}\n', name)
    fields = {"prompt": "", "seed": 0, "choices": ["x"]}
    assert found == [
        Request("a\nb", {"prompt": "a\nb", "id": 7}),
        Request("", fields, seed=0, choices=("x",)),
    ]


def test_standard_input_is_read_without_a_path(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    with open_requests(None) as requests:
        assert list(requests) == list(requests) == [Request("hello", {})]


def test_a_pipe_has_a_name(tmp_path):
    """As of `--input <(command)`: it can be read once only."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("hello\n",))
    writer.start()
    with open_requests(tmp_path / "pipe") as requests:
        assert list(requests) == list(requests) == [Request("hello", {})]
    writer.join()


def test_the_digest_is_of_the_rows(tmp_path):
    digests = set()
    for text in ("a\nb\n", "a\n\nb", "b\na\n"):
        (tmp_path / "p.txt").write_text(text)
        with open_requests(tmp_path / "p.txt") as requests:
            digests.add(requests.check())
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ('{"prompt": "a"}\n\n{"prompt": "b"\n', "p.jsonl", "p.jsonl, line 3: found no JSON"),
        ('{"prompt": "a"}\n{"text": "b"}\n', "p.txt", "line 2: found .*text.*, expected a JSON object with a text"),
        ('{"prompt": 3}\n', "p.txt", "line 1: found"),
        ('{"prompt": "\\ud800"}\n', "p.txt", "line 1: found half of a surrogate pair"),
        ('{"prompt": "a", "choices": ["\\ud800"]}\n', "p.txt", "line 1: found half of a surrogate pair"),
        ('{"prompt": "a", "note": ["\\uDC00"]}\n', "p.txt", "line 1: found half of a surrogate pair"),
        ('{"prompt": "a", "max_new_tokens": 1000000000000}\n', "p.txt", "found max_new_tokens 10+, expected at most"),
        ('{"prompt": "a", "choices": []}\n', "p.txt", "line 1: found choices"),
        ('{"prompt": "a", "seed": true}\n', "p.txt", "line 1: found seed True"),
        ('{"prompt": "a", "max_new_tokens": 0}\n', "p.txt", "found max_new_tokens 0, expected .* at least 1"),
        ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}\n{"prompt": "c", "id": 1}', "p.txt", "line 3: .*line 1"),
        ("plain\n", "p.jsonl", "line 1: found no JSON"),
        ("[" * 100_000, "p.jsonl", "line 1: found no JSON"),
        ("\n \n", "p.txt", "found no prompt"),
    ],
)
def test_bad_input_is_named_by_its_line(tmp_path, text, name, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, text, name)


def test_unreadable_input_is_named(tmp_path):
    with pytest.raises(DataError, match="nothing.txt: unreadable"), open_requests(tmp_path / "nothing.txt"):
        pass
    with pytest.raises(DataError, match="unreadable"), open_requests(tmp_path):
        pass
    (tmp_path / "latin.txt").write_bytes(b"one\ncaf\xe9\n")
    with pytest.raises(DataError, match="line 2: found a byte at 3 that is no UTF-8"):
        with open_requests(tmp_path / "latin.txt") as requests:
            requests.check()


def test_a_large_file_is_not_held(tmp_path):
    """Twenty megabytes are read within a small part of that."""
    import tracemalloc

    line = json.dumps({"prompt": "x" * 1000}) + "\n"
    (tmp_path / "large.jsonl").write_text(line * 20_000)
    with open_requests(tmp_path / "large.jsonl") as requests:
        tracemalloc.start()
        assert requests.check().rows == 20_000
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
        tracemalloc.stop()
