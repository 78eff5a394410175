"""Tokens per second of `prepare`, text to finished store, against the SentencePiece library alone, in the same run.

    python benchmarks/prepare_vs_tokenizer.py

The text: the docstrings of Python and of the packages of this environment, repeated to `--megabytes`, as JSON lines in
one file; a unigram vocabulary trained on it. Both sides use the same number of cores.

The library: `SentencePieceProcessor.encode(documents, num_threads=cores)` on documents that are in memory already, by
its default (lists of Python numbers) and by its fastest way (NumPy arrays, if it has it); only the call is timed.
Ours: the whole of `t5x-like prepare` in a fresh process: start, imports, reading and parsing the file, dividing it,
tokenising, writing parts, assembling the store with its checksums, and the processes that it starts.

The sides take turns. Reported are medians of tokens per CPU second (user and system time of all threads and processes,
which other work on the machine disturbs less) and per second by the wall clock.
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
from t5x_like.data.prepare import prepare
text, model, store, workers = sys.argv[1:]
data = DataConfig(
    corpus=CorpusConfig(files=(text,)), tokenizer=TokenizerConfig(path=model), store=store,
    layout="causal_lm", mixture=(CausalLM(),), inputs_length=8, targets_length=8,
)
(found,) = prepare(data, report=lambda line: None, workers=int(workers))
splits = [found.split(name) for name in ("train", "validation")]
print(sum(split.num_tokens - split.num_documents for split in splits))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--model", type=Path, help="a SentencePiece model, in place of training one")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    documents = some_text(options.megabytes * 10**6)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, model = folder / "text.jsonl", options.model or folder / "the.model"
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
        if options.model is None:
            model.write_bytes(trained(documents, options.vocab_size))
        sides = library_sides(documents, model, options.workers)
        numbers = iter(range(10**6))
        sides["prepare"] = lambda: prepared(text, model, folder / f"stores{next(numbers)}", options.workers)
        seen: dict[str, list[tuple[int, float, float]]] = {side: [] for side in sides}
        for _ in range(options.repeats):
            for side, run in sides.items():
                seen[side].append(run())
    report(seen, documents, options.workers)


def some_text(size: int) -> list[str]:
    from t5x_like.data import python_docs

    documents = python_docs.read(packages=True)
    found: list[str] = []
    while size > 0:
        for document in documents:
            found.append(document)
            size -= len(document.encode())
            if size <= 0:
                break
    return found


def trained(documents: list[str], vocab_size: int) -> bytes:
    from t5x_like.data import tokenizers

    return tokenizers.train_sentencepiece(documents[: len(set(documents))], vocab_size)


def library_sides(documents: list[str], model: Path, workers: int) -> dict[str, Callable[[], tuple[int, float, float]]]:
    """(tokens, CPU seconds, seconds) of each way to call the library."""
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


def prepared(text: Path, model: Path, store: Path, workers: int) -> tuple[int, float, float]:
    """(tokens without EOS, CPU seconds, seconds) of a process that prepares a store."""

    def children() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    cpu, wall = children(), time.perf_counter()
    command = [sys.executable, "-c", PREPARE, str(text), str(model), str(store), str(workers)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout), children() - cpu, time.perf_counter() - wall


def report(seen: dict[str, list[tuple[int, float, float]]], documents: list[str], workers: int) -> None:
    size = sum(len(document.encode()) for document in documents)
    print(f"{len(documents):,} documents, {size / 1e6:.1f} MB, {workers} cores")
    rates: dict[str, tuple[float, float]] = {}
    for side, runs in seen.items():
        per_cpu = statistics.median(tokens / cpu for tokens, cpu, _ in runs)
        per_second = statistics.median(tokens / wall for tokens, _, wall in runs)
        rates[side] = per_cpu, per_second
        tokens = f"{runs[0][0] / 1e6:.2f} M tokens"
        print(f"{side:16} {tokens:>18} {per_cpu / 1e6:8.2f} Mtok/CPU s {per_second / 1e6:8.2f} Mtok/s")
    for side in seen:
        if side != "prepare":
            ratios = [ours / theirs for ours, theirs in zip(rates["prepare"], rates[side], strict=True)]
            print(f"prepare / {side}: {ratios[0]:.2f} by CPU second, {ratios[1]:.2f} by the wall clock")


if __name__ == "__main__":
    main()
