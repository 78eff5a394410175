"""Time and memory of a packing plan: made once by `prepare`, and opened by a run.

    python benchmarks/packing_plan.py --documents 100000000

A store of short documents of random lengths (4 to 12 tokens, 24 bytes of disk each) is written, and its plan is made
for rows of 128 tokens and stored. Then new processes open a stream and take its first batches, with the stored plan
and, if --without is given, without it. Each line is of a process of its own: its seconds, its CPU seconds, and its
largest resident set, with the libraries.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from t5x_like.config import CausalLM, DataConfig
from t5x_like.data.store.token_store import Store, StoreWriter
from t5x_like.data.stream.packing_planner import PackingPlanner
from t5x_like.data.stream.row_stream import TrainingStream, corpus_key
from t5x_like.utils.progress import ProgressDisplay

_WRITTEN = 2**20
ROWS, BATCHES = 64, 10
DATA = DataConfig(
    layout="causal_lm", mixture=(CausalLM(),), inputs_length=64, targets_length=64, example_mode="documents"
)


def write_store(path: Path, documents: int) -> None:
    """Write a store of random documents."""
    random = np.random.default_rng(0)
    with StoreWriter(path, vocab_size=1000) as writer:
        for first in range(0, documents, _WRITTEN):
            lengths = random.integers(4, 13, min(_WRITTEN, documents - first)).astype(np.uint64)
            tokens = random.integers(100, 900, int(lengths.sum()), np.uint16)
            writer.extend("train", tokens, lengths, int(lengths.sum()))
        writer.commit({"vocabulary": {"base_size": 990, "num_sentinels": 0}, "tokenizer_fingerprint": ""})


def make(path: Path) -> dict[str, float]:
    """Make and store the plan; return its examples and rows."""
    store = Store.open(path)
    split = store.split("train")
    planner = PackingPlanner(split, store.sequences_per_document, DATA, DATA.objectives, corpus_key(DATA, 0))
    with ProgressDisplay(split.num_documents, "packing", report=lambda line: print(line, file=sys.stderr)) as display:
        totals = planner.store(display)
    return {"examples": totals.examples, "rows": totals.rows, "fill": split.num_tokens / totals.rows / 128}


def read(path: Path, seed: int) -> dict[str, float]:
    """Open a stream and take batches; return the seconds of both."""
    began = time.perf_counter()
    stream = TrainingStream([Store.open(path)], dataclasses.replace(DATA, seed=seed), ROWS)
    opened = time.perf_counter()
    for step in range(BATCHES):
        stream.batch(1000 * step)
    return {"open": opened - began, "batch": (time.perf_counter() - opened) / BATCHES}


def measured(stage: str, path: Path) -> dict[str, float]:
    """Return the figures of a stage in a process of its own, its seconds and its memory in MiB."""
    command = [sys.executable, __file__, "--stage", stage, "--store", str(path)]
    began = time.perf_counter()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return {**json.loads(output.splitlines()[-1]), "seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10**7)
    parser.add_argument("--without", action="store_true", help="also open without a stored plan")
    parser.add_argument("--stage", choices=("make", "stored", "other"), help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage is not None:
        stages = {"make": lambda: make(options.store), "stored": lambda: read(options.store, 0)}
        figures = stages.get(options.stage, lambda: read(options.store, 1))()
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(json.dumps({**figures, "cpu_seconds": used.ru_utime + used.ru_stime, "MiB": used.ru_maxrss / 1024}))
        return
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "store"
        write_store(path, options.documents)
        print(f"{platform.processor() or platform.machine()}, {options.documents:,} documents")
        for stage in ("make", "stored", *(("other",) if options.without else ())):
            print(stage, json.dumps(measured(stage, path)), flush=True)


if __name__ == "__main__":
    main()
