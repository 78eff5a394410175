"""Valid examples of what runs, evaluations, teachers, dialogues and clients of `serve` leave or send."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from helpers.config_examples import example
from helpers.foreign_kind import Kind

from t5x_like import diagnosis, run_directory
from t5x_like.checkpoints import commit_record
from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.checkpoints.checksums import verify_checksums
from t5x_like.config import CorpusConfig
from t5x_like.config.recipes import load_recipe
from t5x_like.config.serialization import to_json
from t5x_like.data.chat.encoding import DialogueEncoder, encode_rendered, load_template
from t5x_like.data.sources import text_files
from t5x_like.data.sources.document import ReadStats
from t5x_like.data.stream import reference_log_probs
from t5x_like.data.stream.stored_teacher import Header, open_stored_teacher
from t5x_like.data.tokenizers.bytes import ByteTokenizer
from t5x_like.data.tokenizers.published import load_published
from t5x_like.embedding.embed_files import read_texts
from t5x_like.errors import ConfigError
from t5x_like.evaluation.comparison import read_checkpoint
from t5x_like.evaluation.score_predictions import score_file
from t5x_like.reports.comparison_page import render
from t5x_like.serving import chat_schema, openai_schema
from t5x_like.serving.tokenizer_routes import DetokenizeRequest, TokenizeRequest
from t5x_like.storage import lease
from t5x_like.trainer import crash_loop
from t5x_like.utils.jsonl import encode_records


def _lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _files(**texts: str) -> Callable[[Path], None]:
    """Return a function that writes files; "__" in a name stands for the dot."""

    def make(folder: Path) -> None:
        for name, text in texts.items():
            (folder / name.replace("__", ".")).write_text(text)

    return make


def _sizes(folder: Path) -> None:
    (folder / "params" / "d").mkdir(parents=True)
    (folder / "params" / "d" / "x").write_bytes(b"abc")
    (folder / "SIZES").write_text("3  params/d/x\n")
    _sign_sizes(folder)


def _sign_sizes(folder: Path) -> None:
    if (folder / "SIZES").is_file() and not (folder / "SHA256SUMS").is_dir():
        digest = hashlib.sha256((folder / "SIZES").read_bytes()).hexdigest()
        (folder / "SHA256SUMS").write_text(f"{digest}  SIZES\n")


@functools.lru_cache(maxsize=1)
def _teacher_header(folder: Path) -> tuple[Any, Header]:
    data = dataclasses.replace(example().data, store_dir=str(folder))
    return data, Header.of({"teacher": "a"}, 3, 300, {"main": (2, 4)}, steps=1)


def _teacher(folder: Path) -> None:
    stored = open_stored_teacher(*_teacher_header(folder), create=True)
    stored.write("main", 0, np.arange(24, dtype=np.int32).reshape(2, 4, 3), np.zeros((2, 4, 3), np.float32))


def _sign_chunks(folder: Path) -> None:
    for path in folder.glob("teacher-*/*.chunk"):
        if path.is_file() and len(data := path.read_bytes()) > 4:
            path.write_bytes(data[:-4] + zlib.crc32(data[:-4]).to_bytes(4, "little"))


def _read_teacher(folder: Path) -> object:
    return open_stored_teacher(*_teacher_header(folder), create=False).features("main", np.array([1, 0]))


_LOG_PROBS = ({"model": "m", "data": "d"}, {"split": "files/train", "first": 0, "chosen": [-1.5], "rejected": [-2.0]})


def _read_log_probs(folder: Path) -> object:
    values = {"files/train": np.full((2, 2), np.nan, np.float32)}
    found = reference_log_probs.read_lines(folder / reference_log_probs.FILE, values)
    return found, reference_log_probs.is_complete(values), reference_log_probs.digest(values)


_LIMITS = openai_schema.Limits("m", vocab_size=300, max_prompt_length=50, max_new_tokens=50, draw_seed=lambda: 1)
_TOKENIZER = ByteTokenizer(8)
_MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def _request(parse: Callable[[bytes], object]) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        path = folder / "body.json"
        try:
            return parse(path.read_bytes() if path.is_file() else b"")
        except openai_schema.BadRequest as error:
            return json.dumps(error.body()).encode()

    return read


def _parse_completion(body: bytes) -> object:
    return openai_schema.parse(body, _LIMITS, lambda text: list(text.encode()))


def _parse_chat(body: bytes) -> object:
    template = load_template(_TOKENIZER, None)

    def encode(messages: Any, tools: Any) -> list[int]:
        return encode_rendered(_TOKENIZER, template.render(messages, tools, add_generation_prompt=True))[0]

    return chat_schema.parse_chat(body, _LIMITS, encode)


def _parse_text(body: bytes) -> object:
    return list(_TOKENIZER.encode(openai_schema.validated(body, TokenizeRequest).prompt))


def _parse_ids(body: bytes) -> object:
    tokens = openai_schema.validated(body, DetokenizeRequest).tokens
    return _TOKENIZER.decode([token for token in tokens if 0 <= token < 300])


_BODY = {"prompt": ["ab", "c"], "max_tokens": 5, "temperature": 0.5, "stop": ["x"], "n": 1, "stream": True}
_CHAT = {"messages": [_MESSAGES[0]], "max_tokens": 5, "logprobs": True, "top_logprobs": 2, "tools": [{"name": "f"}]}


def _chats(name: str, **fields: Any) -> Callable[[Path], object]:
    """Return the reader of the dialogues in a corpus of one file, which also encodes them."""

    def read(folder: Path) -> object:
        config, encoder = _corpus(folder / name, tuple(fields.items()))
        units = text_files.list_work_units(config)
        documents = [one for unit in units for one in text_files.read_unit(unit, config, ReadStats())]
        return [encoder.sequences(one.text) for one in documents]

    return read


@functools.lru_cache(maxsize=2)
def _corpus(file: Path, fields: tuple[tuple[str, Any], ...]) -> tuple[CorpusConfig, DialogueEncoder]:
    config = CorpusConfig(files=(str(file),), packages=False, **dict(fields))
    return config, DialogueEncoder(_TOKENIZER, config)


_DIALOGUES = _lines({"messages": _MESSAGES, "tools": None}, {"messages": json.dumps(_MESSAGES), "tools": "[]"})
_PAIRS = _lines(
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": json.dumps(_MESSAGES[:1]), "chosen": json.dumps(_MESSAGES[1:]), "rejected": [_MESSAGES[1] | {"x": 1}]},
)
_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"


def _read_template(folder: Path) -> object:
    template = load_template(_TOKENIZER, str(folder / "chat_template.jinja"))
    return encode_rendered(_TOKENIZER, template.dialogue(_MESSAGES))


_EVALUATION = {
    "step": 2,
    "held_out": [{"fingerprint": "f", "tokenizer": "t", "documents": 2, "bytes": 9}],
    "objectives": {"R": {"loss": 1.0, "tokens": 5}},
    "prefix_lm": {"bits_per_byte": 1.0},
    "tasks": {"t": {"em": 1.0, "examples": 2}},
    "task_sets": ["t"],
}
_HELD_OUT = [{"objective": "R", "digest": str(n), "loss": 1.0 + n, "tokens": 3, "bytes": 4} for n in range(2)]
_ANSWERS = [{"index": n, "inputs": "a", "target": "b", "prediction": "b", "output": "b"} for n in range(2)]
_SAMPLES = [{"denoiser": "R", "inputs": "a <extra_id_0>", "targets": "<extra_id_0> b", "prediction": "b"}]


def _evaluated(folder: Path) -> None:
    (folder / "config.json").write_text(to_json(example()))
    (folder / "evaluations.jsonl").write_text("".join(f"{line}\n" for line in encode_records([_EVALUATION])))
    (folder / "samples.json").write_text(json.dumps(_SAMPLES))
    details = folder / "evaluations" / "2"
    details.mkdir(parents=True)
    (details / "held_out.jsonl").write_text(_lines(*_HELD_OUT))
    (details / "t.jsonl").write_text(_lines(*_ANSWERS))
    (details / "t.metrics.json").write_text(json.dumps({"draws": {"em": [0.5, 1.0, None]}}))


def sign_records(folder: Path) -> None:
    """Renew the checks of the lines that are JSON objects."""
    for path in (folder / "metrics.jsonl", folder / "evaluations.jsonl"):
        if not path.is_file():
            continue
        records = []
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, RecursionError):
                records.append(json.loads(line))
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            own = [{k: v for k, v in record.items() if k not in ("crc32", "previous_step")} for record in records]
            path.write_text("".join(f"{line}\n" for line in encode_records(own)))


def _read_evaluated(folder: Path) -> object:
    found = read_checkpoint(CheckpointRef(folder))
    return render([found, dataclasses.replace(found, name="other")])


_ROWS = _lines({"target": "ab c", "prediction": "ab"}, {"target": ["x", "y"], "prediction": "y"})


def _read_scores(folder: Path) -> object:
    return score_file(folder / "rows.jsonl", ["squad", "accuracy"], draws=4)


def _read_run_files(folder: Path) -> object:
    run_directory._read_record(folder)
    crash_loop._count(folder / "starts.json", 4, 1000)
    return list(diagnosis._last_exit(folder)) if (folder / "exit.json").is_file() else None


_RUN_FILES = {
    "run__json": '{"run_id": "0123456789abcdef", "checkpoints": null}',
    "starts__json": '{"step": 4, "count": 2}',
    "exit__json": '{"code": 0, "reason": "done", "step": 2, "process": 0, "seconds": {"train": 1.0}}',
}


def _read_recipe(folder: Path) -> object:
    return load_recipe(str(folder / "recipe.json"))


def _published(**files: str) -> Kind:
    def read(folder: Path) -> object:
        with contextlib.suppress(ConfigError):  # Fewer sentinels than are asked for.
            tokenizer = load_published(folder, 0)
            return tokenizer.decode(tokenizer.encode("ab a"))
        return None

    return Kind(_files(**files), read)


_WORDS = "".join(f"{word}\n" for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "ab", "##b"))
_BPE = {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "<|endoftext|>": 4}


def _commit_record(folder: Path) -> None:
    (folder / "4.json").write_bytes(commit_record.encoded({"step": 4, "files": {"a": [1, "b"]}}))


def _sign_commit_record(folder: Path) -> None:
    path = folder / "4.json"
    if path.is_file():
        text = path.read_bytes().partition(b"\n")[0]
        path.write_bytes(text + b"\n" + hashlib.sha256(text).hexdigest().encode() + b"\n")


def _bytes_or_none(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _read_lease(folder: Path) -> object:
    holder = _bytes_or_none(folder / "lock") or b""
    return lease._named(holder), lease._is_of(holder, "s"), lease._has_ended(holder)


_HOLDER = {"host": "h", "pid": 5, "secret": "s", "renewal": "r", "machine": "m", "started": "7"}

KINDS: dict[str, Kind] = {
    "list of sizes": Kind(_sizes, verify_checksums, _sign_sizes),
    "teacher's tokens": Kind(_teacher, _read_teacher, _sign_chunks),
    "log-probabilities of a reference": Kind(
        _files(reference_log_probs__jsonl=_lines(*_LOG_PROBS)),
        _read_log_probs,
    ),
    "request": Kind(_files(body__json=json.dumps(_BODY)), _request(_parse_completion)),
    "request of a chat": Kind(_files(body__json=json.dumps(_CHAT)), _request(_parse_chat)),
    "request to tokenize": Kind(_files(body__json='{"prompt": "ab"}'), _request(_parse_text)),
    "request to detokenize": Kind(_files(body__json='{"tokens": [5, 6]}'), _request(_parse_ids)),
    "dialogues": Kind(_files(t__jsonl=_DIALOGUES), _chats("t.jsonl", messages_field="messages")),
    "dialogues as turns": Kind(
        _files(t__jsonl=_DIALOGUES), _chats("t.jsonl", messages_field="messages", messages_as="turns")
    ),
    "preference pairs": Kind(
        _files(t__jsonl=_PAIRS),
        _chats("t.jsonl", messages_field="prompt", text_field="chosen", rejected_field="rejected"),
    ),
    "chat template": Kind(_files(chat_template__jinja=_TEMPLATE), _read_template),
    "evaluated checkpoint": Kind(_evaluated, _read_evaluated, sign_records),
    "rows to score": Kind(_files(rows__jsonl=_ROWS), _read_scores),
    "texts to embed": Kind(
        _files(t__jsonl='{"text": "a"}\n{"text": "b"}\n'), lambda f: read_texts(f / "t.jsonl", "text")
    ),
    "identity, starts and end of a run": Kind(_files(**_RUN_FILES), _read_run_files),
    "recipe in JSON": Kind(lambda f: (f / "recipe.json").write_text(to_json(example())) and None, _read_recipe),
    "WordPiece vocabulary": _published(vocab__txt=_WORDS, tokenizer_config__json='{"do_lower_case": true}'),
    "vocab.json and merges.txt": _published(
        vocab__json=json.dumps(_BPE), merges__txt="#version: 0.2\na b\n", tokenizer_config__json='{"eos_token": "a"}'
    ),
    "commit record": Kind(
        _commit_record, lambda f: commit_record.decoded(_bytes_or_none(f / "4.json")), _sign_commit_record
    ),
    "holder of a lease": Kind(_files(lock=json.dumps(_HOLDER)), _read_lease),
}
