"""Valid examples of every kind of file that may come from others, each with the function that reads it."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
from helpers.config_examples import example
from helpers.data_examples import data_config, numbered_store, pair_store, text_store
from helpers.foreign_documents import KINDS as KINDS_OF_DOCUMENTS
from helpers.foreign_documents import sign_records
from helpers.foreign_kind import Kind

from t5x_like.checkpoints import model_dir
from t5x_like.checkpoints.checksums import verify_checksums, write_checksums
from t5x_like.config import CausalLM, CorpusConfig, ModelConfig, StackConfig, TokenizerConfig
from t5x_like.config.serialization import to_json
from t5x_like.config.validation import validate
from t5x_like.config.validation.model import model_problems
from t5x_like.data.sources import text_files
from t5x_like.data.sources.document import ReadStats
from t5x_like.data.store.stored_plan import find_damage
from t5x_like.data.store.token_store import Store
from t5x_like.data.stream.packing_planner import PackingPlanner
from t5x_like.data.stream.row_stream import corpus_key
from t5x_like.data.tokenizers.loading import load_directory_tokenizer, load_tokenizer
from t5x_like.data.tokenizers.published import load_published
from t5x_like.data.tokenizers.train_vocabulary import train_sentencepiece
from t5x_like.decoding.prompt_reader import open_prompts
from t5x_like.evaluation.answer_cache import AnswerCache
from t5x_like.evaluation.results_store import read_evaluations
from t5x_like.interop.huggingface import special_tokens
from t5x_like.interop.huggingface.config_reader import Fields
from t5x_like.interop.huggingface.families import get_family
from t5x_like.interop.huggingface.families.family import Present
from t5x_like.interop.huggingface.family_matching import model_type
from t5x_like.interop.safetensors_file import SINGLE, Pending, TensorFile, write, write_sharded
from t5x_like.interop.t5x.checkpoint_reader import Arrays
from t5x_like.interop.weight_files import Weights
from t5x_like.planning.plan_file import _REQUIRED_KEYS, VERSION, read_plan
from t5x_like.plugins import read_record
from t5x_like.reports.run_data import read_run
from t5x_like.reports.run_report import render
from t5x_like.run_directory import read_config
from t5x_like.utils.jsonl import read_records
from t5x_like.utils.progress import ProgressDisplay
from t5x_like.utils.resumable_jsonl import read_settings


def _text(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def _run(folder: Path) -> None:
    (folder / "config.json").write_text(to_json(example()))


def _read_run(folder: Path) -> object:
    return validate(read_config(folder))


def _imported(folder: Path) -> None:
    stack = StackConfig(num_layers=1, d_model=8, num_heads=2, num_kv_heads=2, head_dim=4, d_ff=16)
    model_dir.describe(folder, ModelConfig(encoder=None, decoder=stack, vocab_size=32), "llama")


def _text_store(folder: Path) -> None:
    text_store(folder / "s", ["ab c", "def"], ["x"])


def _pair_store(folder: Path) -> None:
    pair_store(folder / "s", [(2, 1), (3, 2)])


def _planner(folder: Path) -> PackingPlanner:
    data = dataclasses.replace(data_config("causal_lm", (CausalLM(),)), example_mode="documents")
    split = Store.open(folder / "s").split("train")
    return PackingPlanner(split, 1, data, (CausalLM(),), corpus_key(data, 0))


def _packing_plan(folder: Path) -> None:
    numbered_store(folder / "s", 80, lengths=[2, 3, 5, 30, 40])
    _planner(folder).store(ProgressDisplay(5, "packing"))


def _read_packing_plan(folder: Path) -> object:
    plan = _planner(folder).open()
    return plan.examples_of_rows(np.arange(min(plan.totals.rows, 3))), find_damage(folder / "s" / "train")


def _sign(folder: Path) -> None:
    info, marker = folder / "s" / "info.json", folder / "s" / "COMMITTED"
    if info.is_file() and marker.is_file():
        try:
            document = json.loads(info.read_bytes())
            for name, record in document["arrays"].items():
                record["metadata"] = hashlib.sha256((folder / "s" / name / "zarr.json").read_bytes()).hexdigest()
            info.write_text(json.dumps(document, indent=2))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            pass
        marker.write_text(hashlib.sha256(info.read_bytes()).hexdigest())


def _read_store(folder: Path) -> object:
    store = Store.open(folder / "s")
    split = store.split("train")
    if store.sequences_per_document == 1:
        _ = store.tokenizer.traits
    return [split.offsets, split.gather(np.array([0, 3]), 4), split.token_counts(), store.find_damage()]


def _sentencepiece(folder: Path) -> None:
    texts = [f"the word {i} and {i * 7 % 31} of it" for i in range(60)]
    (folder / "spiece.model").write_bytes(train_sentencepiece(texts, 285))


def _read_sentencepiece(folder: Path) -> object:
    path = folder / "spiece.model"
    tokenizer = load_tokenizer(TokenizerConfig(num_sentinels=2), path)
    return tokenizer.decode(tokenizer.encode("the word of it"))


def _published_sentencepiece(folder: Path) -> None:
    _sentencepiece(folder)
    entry = {"content": "<new>", "special": True, **dict.fromkeys(_PLAIN, False)}
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 5, "added_tokens_decoder": {"285": entry}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _read_published_sentencepiece(folder: Path) -> object:
    tokenizer = load_published(folder, 0)
    return tokenizer.decode(tokenizer.encode("the word of it"))


def _huggingface_tokenizer(folder: Path) -> None:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = ("<pad>", "</s>", "<unk>")
    document = {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": name, "special": True, **dict.fromkeys(_PLAIN, False)}
            for number, name in enumerate(special)
        ],
        "model": {"type": "BPE", "vocab": {n: i for i, n in enumerate((*special, "a", "b", "ab"))}, "merges": ["a b"]},
        "pre_tokenizer": level,
        "decoder": level,
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    roles = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))


_PLAIN = ("single_word", "lstrip", "rstrip", "normalized")


def _read_huggingface_tokenizer(folder: Path) -> object:
    tokenizer = load_directory_tokenizer(folder, ModelConfig(encoder=None, decoder=None, vocab_size=16))
    return tokenizer.decode(tokenizer.encode("ab")), tokenizer.to_bytes(range(6))


def _tensors() -> list[Pending]:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.int8), "c": np.zeros((), np.int64)}
    return [Pending(name, array.dtype, array.shape, lambda array=array: array) for name, array in arrays.items()]


def _read_safetensors(folder: Path) -> object:
    file = TensorFile(folder / SINGLE)
    return [file.read(name).sum() for name in file.tensors]


def _read_weights(folder: Path) -> object:
    weights = Weights(folder)
    return [weights.read(name).sum() for name in weights]


def _t5x(**keywords: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from helpers.t5x_examples import write_legacy, write_orbax

        found = {"a/kernel": np.arange(64, dtype=np.float32).reshape(8, 8), "b": np.ones(3, np.float32)}
        (write_legacy if keywords.pop("legacy", False) else write_orbax)(folder / "c", found, **keywords)

    return make


def _read_t5x(folder: Path) -> object:
    arrays = Arrays(folder / "c")
    small = [path for path, stored in arrays.items() if stored.shape in ((8, 8), (3,), ())]
    return [arrays.read(path) for path in small if not arrays.missing_chunks(path)]


def _corpus(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def _corpus_reader(name: str, **fields: Any) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        config = _corpus_config(folder / name, tuple(fields.items()))
        units = text_files.list_work_units(config)
        return [document for unit in units for document in text_files.read_unit(unit, config, ReadStats())]

    return read


@functools.lru_cache(maxsize=2)
def _corpus_config(file: Path, fields: tuple[tuple[str, Any], ...]) -> CorpusConfig:
    return CorpusConfig(files=(str(file),), packages=False, **dict(fields))


def _pairs(name: str) -> Callable[[Path], object]:
    return _corpus_reader(name, inputs_field="inputs")


_COLUMNS = {"text": ["one", "zwö", "drei"] * 4, "inputs": ["a", "b", "c"] * 4}


def _arrow() -> bytes:
    table = pyarrow.table(_COLUMNS)
    buffer = io.BytesIO()
    with pyarrow.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    return buffer.getvalue()


def _array_record(folder: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(folder / "t.array_record"), "group_size:1")
    for row in _ROWS.splitlines():
        writer.write(row)
    writer.close()


def _saved_dataset(folder: Path) -> None:
    (folder / "t.d").mkdir()
    (folder / "t.d" / "data-00000-of-00001.arrow").write_bytes(_arrow())
    (folder / "t.d" / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')


def _parquet() -> bytes:
    table = pyarrow.table(_COLUMNS)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, row_group_size=5)
    return buffer.getvalue()


_ROWS = b'{"text": "a", "inputs": "b"}\n{"text": "\\u00e9\\n", "inputs": ""}\n'
_RECORDS = '{"step": 1, "loss": 2.5, "loss/R": "NaN"}\n{"step": 2, "loss": 1.5, "learning_rate": 0.1}\n'
_EVALUATION = {
    "step": 2,
    "objectives": {"R": {"loss": 1.0, "tokens": 5}},
    "tasks": {"t": {"em": 1.0, "examples": 3}},
    "prefix_lm": {"bits_per_byte": 1.0},
    "baselines": {"gzip_bits_per_byte": 3.0},
    "task_sets": ["t"],
}
_SAMPLES = [{"denoiser": "R", "inputs": "a <extra_id_0>", "targets": "<extra_id_0> b", "prediction": "b"}]


def _report(folder: Path) -> None:
    _run(folder)
    (folder / "metrics.jsonl").write_text(_RECORDS)
    (folder / "evaluations.jsonl").write_text(json.dumps(_EVALUATION) + "\n")
    (folder / "evaluation.json").write_text(json.dumps(_EVALUATION))
    (folder / "samples.json").write_text(json.dumps(_SAMPLES))
    sign_records(folder)
    exit_document = {"code": 0, "reason": "done", "step": 2, "process": 0, "seconds": {"train": 1.0}}
    (folder / "exit.json").write_text(json.dumps(exit_document))


def _read_report(folder: Path) -> object:
    metrics = folder / "metrics.jsonl"
    return render(read_run(folder)), read_evaluations(folder), read_records(metrics) if metrics.is_file() else None


def _checksums(folder: Path) -> None:
    (folder / "d").mkdir()
    (folder / "d" / "x").write_bytes(b"abc")
    write_checksums(folder)


def _plan(folder: Path) -> None:
    plan = {"version": VERSION, **{key: {"total": 1} for key in sorted(_REQUIRED_KEYS)}}
    (folder / "plan.json").write_text(json.dumps(plan))


def _plugins(folder: Path) -> None:
    (folder / "plugins").mkdir()
    (folder / "plugins" / "plugins.json").write_text(json.dumps({"a.py": {"path": "/a.py", "sha256": "0" * 64}}))


def _huggingface_config(name: str) -> Callable[[Path], None]:
    from t5x_like.models import presets

    model = {"t5": presets.t5_1_1("small"), "gemma3_text": presets.gemma_3("270m"), "bert": presets.bert("base")}[name]
    document = {"model_type": name, **special_tokens.write(model), **get_family(name).write(model)}
    return _text("config.json", json.dumps(document))


def _read_huggingface_config(folder: Path) -> object:
    fields = Fields.read(folder / "config.json")
    family = get_family(model_type(fields, ()))
    model = special_tokens.read(fields, family.special_tokens, family.read(fields, Present(head=True, masked_lm=False)))
    return model_problems(model)


def _read_prompts(folder: Path) -> object:
    with open_prompts(folder / "prompts.jsonl") as prompts:
        return list(prompts)


def _answers(folder: Path) -> None:
    with AnswerCache(folder / "answers.jsonl", {"model": "m"}) as cache:
        cache.add({"a": [1.0]})


def _read_answers(folder: Path) -> object:
    with AnswerCache(folder / "answers.jsonl", {"model": "m"}) as cache:
        return len(cache)


_PROMPTS = '{"prompt": "a", "seed": 1, "choices": ["x", "y"]}\n{"prompt": "b", "max_new_tokens": 3}\n'

KINDS: dict[str, Kind] = {
    "config.json of a run": Kind(_run, _read_run),
    "model.json": Kind(_imported, model_dir.read_model),
    "token store": Kind(_text_store, _read_store, _sign),
    "token store of pairs": Kind(_pair_store, _read_store, _sign),
    "packing plan": Kind(_packing_plan, _read_packing_plan, _sign),
    "SentencePiece model": Kind(_sentencepiece, _read_sentencepiece),
    "published SentencePiece model": Kind(_published_sentencepiece, _read_published_sentencepiece),
    "tokenizer.json": Kind(_huggingface_tokenizer, _read_huggingface_tokenizer),
    "safetensors": Kind(lambda f: write(f / SINGLE, _tensors(), {"format": "pt"}), _read_safetensors),
    "index of safetensors": Kind(lambda f: write_sharded(f, _tensors(), max_bytes=8), _read_weights),
    "T5X's msgpack index and zarr arrays": Kind(_t5x(legacy=True), _read_t5x),
    "T5X's OCDBT": Kind(_t5x(), _read_t5x),
    "T5X's folders of arrays": Kind(_t5x(ocdbt=False), _read_t5x),
    "text": Kind(_corpus("t.txt", "ein Text\nü".encode()), _corpus_reader("t.txt")),
    "JSON lines": Kind(_corpus("t.jsonl", _ROWS), _pairs("t.jsonl")),
    "JSON lines of which some are quarantined": Kind(
        _corpus("t.jsonl", _ROWS), _corpus_reader("t.jsonl", inputs_field="inputs", max_bad_records=100)
    ),
    "gzip": Kind(_corpus("t.jsonl.gz", gzip.compress(_ROWS, mtime=0)), _pairs("t.jsonl.gz")),
    "JSON array": Kind(_corpus("t.json", b"[" + _ROWS.strip().replace(b"\n", b",") + b"]"), _pairs("t.json")),
    "CSV": Kind(_corpus("t.csv", b'text,inputs\n"a ""b""",c\nd,\n'), _pairs("t.csv")),
    "CoNLL-U": Kind(
        _corpus("t.conllu", b"# x\n1\ta\ta" + b"\t_" * 7 + b"\n\n"), _corpus_reader("t.conllu", text_field="form")
    ),
    "Arrow": Kind(_corpus("t.arrow", _arrow()), _pairs("t.arrow")),
    "folder of datasets": Kind(_saved_dataset, _pairs("t.d")),
    "ArrayRecord": Kind(_array_record, _pairs("t.array_record")),
    "Parquet": Kind(_corpus("t.parquet", _parquet()), _pairs("t.parquet")),
    "records and results of a run": Kind(_report, _read_report, sign_records),
    "list of checksums": Kind(_checksums, verify_checksums),
    "plan": Kind(_plan, lambda f: read_plan(f / "plan.json")),
    "config.json of a T5": Kind(_huggingface_config("t5"), _read_huggingface_config),
    "config.json of a Gemma 3": Kind(_huggingface_config("gemma3_text"), _read_huggingface_config),
    "config.json of a BERT": Kind(_huggingface_config("bert"), _read_huggingface_config),
    "prompts": Kind(_text("prompts.jsonl", _PROMPTS), _read_prompts),
    "answer cache": Kind(_answers, _read_answers),
    "record of plug-ins": Kind(_plugins, read_record),
    "settings of an output": Kind(_text("o.settings.json", '{"a": 1}'), lambda f: read_settings(f / "o")),
    **KINDS_OF_DOCUMENTS,
}
