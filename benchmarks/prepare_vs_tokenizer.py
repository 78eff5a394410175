"""Tokens per second of `prepare`, from text to finished store, and of the tokenizer's library alone, in one run.

    python benchmarks/prepare_vs_tokenizer.py
    python benchmarks/prepare_vs_tokenizer.py --kind bpe --vocab-size 16000

The text consists of the docstrings of Python and of the packages of this environment, repeated to `--megabytes`, as
JSON lines in one file; a vocabulary is trained on it (`--kind`). Both sides use the same number of cores.

The library: `SentencePieceProcessor.encode(documents, num_threads=cores)` on documents in memory, with its default
result (lists of Python integers) and with its fastest one (NumPy arrays, if supported); only the call is timed.
The tokenizers library (`--kind bpe`, `wordpiece`, `unigram`): `Tokenizer.encode_batch_fast(documents)`, the call alone.
prepare: the whole of `t5x-like prepare` in a new process, that is start, imports, reading and parsing the file,
dividing it, tokenization, writing shards, assembling the store with its checksums, and the processes that it starts.

The sides take turns. The reported numbers are medians of tokens per CPU second (user and system time of all threads and
processes, which other work on the machine disturbs less) and per second of wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PREPARE = """
import sys
from t5x_like.config import CausalLM, CorpusConfig, DataConfig, TokenizerConfig
from t5x_like.data.store.prepare import prepare
text, model, store_dir, workers, kind = sys.argv[1:]
kind, own = (kind, {}) if kind == "sentencepiece" else ("published", {"num_sentinels": 0})
tokenizer = TokenizerConfig(kind=kind, path=model, **own)
data = DataConfig(
    corpus=CorpusConfig(files=(text,)), tokenizer=tokenizer, store_dir=store_dir,
    layout="causal_lm", mixture=(CausalLM(),), inputs_length=8, targets_length=8,
)
(store,) = prepare(data, report=lambda line: None, workers=int(workers))
splits = [store.split(name) for name in ("train", "validation")]
print(sum(split.num_tokens - split.num_documents for split in splits))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--kind", choices=("sentencepiece", "bpe", "wordpiece", "unigram"), default="sentencepiece")
    parser.add_argument("--model", type=Path, help="file of the tokenizer (default: train one)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    documents = some_text(options.megabytes * 10**6)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, model = folder / "text.jsonl", options.model or folder / "tokenizer.json"
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
        if options.model is None:
            model.write_bytes(trained(documents, options.vocab_size, options.kind))
        is_sentencepiece = options.kind == "sentencepiece"
        sides = (sentencepiece_sides if is_sentencepiece else tokenizers_sides)(documents, model, options.workers)
        numbers = iter(range(10**6))
        arguments = text, model, options.workers, options.kind
        sides["prepare"] = lambda: prepared(folder / f"stores{next(numbers)}", *arguments)
        measured: dict[str, list[tuple[int, float, float]]] = {side: [] for side in sides}
        for _ in range(options.repeats):
            for side, run in sides.items():
                measured[side].append(run())
    report(measured, documents, options.workers)


def some_text(size: int) -> list[str]:
    from t5x_like.data.sources import python_docs

    documents = python_docs.read(packages=True)
    selected: list[str] = []
    while size > 0:
        for document in documents:
            selected.append(document)
            size -= len(document.encode())
            if size <= 0:
                break
    return selected


def trained(documents: list[str], vocab_size: int, kind: Any) -> bytes:
    from t5x_like.data.tokenizers.train_vocabulary import train_vocabulary

    model = train_vocabulary(kind, documents[: len(set(documents))], vocab_size)
    return model if kind == "sentencepiece" else json.dumps(json.loads(model)["tokenizer"]).encode()


def tokenizers_sides(
    documents: list[str], model: Path, workers: int
) -> dict[str, Callable[[], tuple[int, float, float]]]:
    """Return a function that measures (tokens, CPU seconds, wall seconds) of the tokenizers library."""
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(model))

    def timed() -> tuple[int, float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        encoded = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
        spent = time.process_time() - cpu, time.perf_counter() - wall
        return sum(map(len, encoded)), *spent

    return {"library": timed}


def sentencepiece_sides(
    documents: list[str], model: Path, workers: int
) -> dict[str, Callable[[], tuple[int, float, float]]]:
    """Return functions that measure (tokens, CPU seconds, wall seconds) for each way to call SentencePiece."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))

    def timed(**keywords: Any) -> tuple[int, float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        encoded = processor.encode(documents, num_threads=workers, **keywords)
        spent = time.process_time() - cpu, time.perf_counter() - wall
        return sum(map(len, encoded)), *spent

    sides = {"library, lists": timed}
    if hasattr(processor, "EncodeAsNumpy"):
        sides["library, NumPy"] = lambda: timed(return_type="numpy")
    return sides


def prepared(store: Path, text: Path, model: Path, workers: int, kind: str) -> tuple[int, float, float]:
    """Return (tokens without EOS, CPU seconds, wall seconds) of a process that prepares a store."""

    def children() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    cpu, wall = children(), time.perf_counter()
    command = [sys.executable, "-c", PREPARE, str(text), str(model), str(store), str(workers), kind]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout), children() - cpu, time.perf_counter() - wall


def report(measured: dict[str, list[tuple[int, float, float]]], documents: list[str], workers: int) -> None:
    size = sum(len(document.encode()) for document in documents)
    print(f"{len(documents):,} documents, {size / 1e6:.1f} MB, {workers} cores")
    rates: dict[str, tuple[float, float]] = {}
    for side, runs in measured.items():
        per_cpu = statistics.median(tokens / cpu for tokens, cpu, _ in runs)
        per_second = statistics.median(tokens / wall for tokens, _, wall in runs)
        rates[side] = per_cpu, per_second
        tokens = f"{runs[0][0] / 1e6:.2f} M tokens"
        print(f"{side:16} {tokens:>18} {per_cpu / 1e6:8.2f} Mtok/CPU s {per_second / 1e6:8.2f} Mtok/s")
    for side in measured:
        if side != "prepare":
            ratios = [prepare / library for prepare, library in zip(rates["prepare"], rates[side], strict=True)]
            print(f"prepare / {side}: {ratios[0]:.2f} by CPU second, {ratios[1]:.2f} by wall time")


if __name__ == "__main__":
    main()
