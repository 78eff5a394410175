"""Prompts are read line by line and repeatedly; invalid lines are refused with their number."""

import io
import json
import os
import threading

import pytest

from t5x_like.decoding.prompt_reader import PromptRequest, open_prompts
from t5x_like.errors import DataError


def read(tmp_path, text, name="prompts.txt"):
    (tmp_path / name).write_bytes(text.encode())
    with open_prompts(tmp_path / name) as requests:
        digest = requests.check()
        result = list(requests)
        assert list(requests) == result and digest.rows == len(result)
        return result


def test_lines_of_text_are_prompts(tmp_path):
    assert read(tmp_path, "one\n\n  two\u2028still two \r\nthree") == [
        PromptRequest("one", {}),
        PromptRequest("  two\u2028still two ", {}),
        PromptRequest("three", {}),
    ]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.txt"])
def test_json_lines_keep_their_other_fields(tmp_path, name):
    result = read(tmp_path, '\ufeff{"prompt": "a\\nb", "id": 7}\n\n{"prompt": "", "seed": 0, "choices": ["x"]}\n', name)
    fields = {"prompt": "", "seed": 0, "choices": ["x"]}
    assert result == [
        PromptRequest("a\nb", {"prompt": "a\nb", "id": 7}),
        PromptRequest("", fields, seed=0, choices=("x",)),
    ]


def test_standard_input_is_read_without_a_path(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    with open_prompts(None) as requests:
        assert list(requests) == list(requests) == [PromptRequest("hello", {})]


def test_pipe_is_read_by_its_path(tmp_path):
    """As with `--input <(command)`: a pipe can be read only once."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("hello\n",))
    writer.start()
    with open_prompts(tmp_path / "pipe") as requests:
        assert list(requests) == list(requests) == [PromptRequest("hello", {})]
    writer.join()


def test_digest_depends_on_the_rows(tmp_path):
    digests = set()
    for text in ("a\nb\n", "a\n\nb", "b\na\n"):
        (tmp_path / "p.txt").write_text(text)
        with open_prompts(tmp_path / "p.txt") as requests:
            digests.add(requests.check())
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ('{"prompt": "a"}\n\n{"prompt": "b"\n', "p.jsonl", "p.jsonl, line 3: found invalid JSON"),
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
        ("plain\n", "p.jsonl", "line 1: found invalid JSON"),
        ("[" * 100_000, "p.jsonl", "line 1: found invalid JSON"),
        ("\n \n", "p.txt", "found no prompt"),
    ],
)
def test_invalid_input_is_refused_with_its_line(tmp_path, text, name, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, text, name)


def test_unreadable_input_is_refused_with_its_path(tmp_path):
    with pytest.raises(DataError, match="nothing.txt: cannot be read"), open_prompts(tmp_path / "nothing.txt"):
        pass
    with pytest.raises(DataError, match="cannot be read"), open_prompts(tmp_path):
        pass
    (tmp_path / "latin.txt").write_bytes(b"one\ncaf\xe9\n")
    with pytest.raises(DataError, match="line 2: found an invalid byte at 3"):
        with open_prompts(tmp_path / "latin.txt") as requests:
            requests.check()


def test_large_file_is_not_held_in_memory(tmp_path):
    """Reading twenty megabytes takes a small part of that memory."""
    import tracemalloc

    line = json.dumps({"prompt": "x" * 1000}) + "\n"
    (tmp_path / "large.jsonl").write_text(line * 20_000)
    with open_prompts(tmp_path / "large.jsonl") as requests:
        tracemalloc.start()
        assert requests.check().rows == 20_000
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
        tracemalloc.stop()
