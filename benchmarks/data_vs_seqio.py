"""Raw tokens per CPU second of t5x_like and of seqio with T5's preprocessors, measured in one run.

    pip install -e . && pip install --no-deps --target build/t5 t5==0.9.4 gin-config babel
    export TF_CPP_MIN_LOG_LEVEL=3
    python benchmarks/data_vs_seqio.py

Both pipelines make batches of UL2's mixture of seven denoisers, one seventh of the examples each, from the same tokens
(the embedded corpus, 32,000 SentencePiece pieces, 128 sentinels), as shuffled encoder-decoder rows of 512/512.

seqio: a Mixture of seven Tasks over TFRecords of tokens, with `span_corruption` and `prefix_lm` of t5 0.9.4, a mode
token before the inputs and EOS after them, through `EncDecFeatureConverter(pack=True)`. T5's file is executed unchanged
but without the rest of its package, which requires nightly builds of other packages. t5x_like: `TrainingStream` with
its prefetch thread, as in training.

Each pipeline runs in its own process with a fixed number of cores (`--cores 1`, then 2). After warm-up they take turns.
The cost of a pipeline is the CPU time of its process since its last answer, so that background work counts; the time
for counting tokens does not. Raw tokens are all tokens except padding, EOS, sentinels and mode tokens. The reported
numbers are medians over the turns. Padding is reported as well: about half of seqio's token positions are empty, which
the ratio does not take into account.

Also measured: the time of a new process to its first batch from the prepared store, with its memory; and the time to
open a stream of 10^12 tokens and make the batch at row 10^9, compared with the batch at row 0.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

PIECES, SENTINELS, LENGTH, ROWS = 32_000, 128, 512, 128
SPECIAL = PIECES
"""First id that is not a text token."""


def data_config(store: str) -> Any:
    from t5x_like.config import CorpusConfig, DataConfig, TokenizerConfig, ul2

    return DataConfig(
        corpus=CorpusConfig(),
        tokenizer=TokenizerConfig(vocab_size=PIECES, num_sentinels=SENTINELS),
        layout="encoder_decoder",
        mixture=ul2(),
        inputs_length=LENGTH,
        targets_length=LENGTH,
        store_dir=store,
    )


def stores_of(data: Any) -> Any:
    from t5x_like.data.store.prepare import open_stores

    return open_stores(data)


def prepare(work: Path) -> None:
    """Prepare the store, and write its documents as TFRecords."""
    from t5x_like.data.store.prepare import prepare as prepare_store

    (store,) = prepare_store(data_config(str(work)))
    done = work / "tfrecords" / "done"
    if done.exists():
        return
    import tensorflow as tf

    done.parent.mkdir(parents=True, exist_ok=True)
    split = store.split("train")
    offsets = split.offsets.astype(np.int64)
    writers = [tf.io.TFRecordWriter(str(done.parent / f"train-{number:02d}-of-16")) for number in range(16)]
    for index, (start, stop) in enumerate(zip(offsets, offsets[1:], strict=False)):
        tokens = split.tokens(start, stop - 1).astype(np.int64)  # Without EOS, which T5's preprocessors do not expect.
        feature = tf.train.Feature(int64_list=tf.train.Int64List(value=tokens))
        example = tf.train.Example(features=tf.train.Features(feature={"targets": feature}))
        writers[index % 16].write(example.SerializeToString())
    for writer in writers:
        writer.close()
    done.touch()


def t5x_like_batches(options: argparse.Namespace) -> Iterator[Mapping[str, Any]]:
    from t5x_like.data.stream.prefetch import Prefetcher
    from t5x_like.data.stream.row_stream import TrainingStream

    data = data_config(str(options.work))
    for batch in Prefetcher(TrainingStream(stores_of(data), data, ROWS), 0):
        assert set(batch) == {"main"}
        yield batch["main"]


def t5_preprocessors(folder: Path) -> Any:
    """Return T5's own module, loaded without its package."""
    import importlib.util

    sys.path.append(str(folder))
    path = folder / "t5" / "data" / "preprocessors.py"
    if not path.exists():
        raise SystemExit(f"{path} is missing: see the docstring of this file, or give the directory with --t5")
    spec = importlib.util.spec_from_file_location("t5_preprocessors", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # AutoGraph looks up the functions' names there.
    spec.loader.exec_module(module)
    return module


def seqio_batches(options: argparse.Namespace) -> Iterator[Mapping[str, Any]]:
    import seqio
    import tensorflow as tf

    t5 = t5_preprocessors(options.t5)
    from t5x_like.config.mixtures import ul2
    from t5x_like.config.objectives import MODES

    vocabulary = seqio.PassThroughVocabulary(PIECES + SENTINELS, eos_id=1)
    features = {name: seqio.Feature(vocabulary, add_eos=True) for name in ("inputs", "targets")}
    source = seqio.TFExampleDataSource(
        {"train": str(options.work / "tfrecords" / "train-*")},
        feature_description={"targets": tf.io.VarLenFeature(tf.int64)},
    )

    def dense(dataset: tf.data.Dataset) -> tf.data.Dataset:
        return dataset.map(
            lambda example: {"targets": tf.cast(tf.sparse.to_dense(example["targets"]), tf.int32)},
            num_parallel_calls=tf.data.AUTOTUNE,
        )

    def with_mode(dataset: tf.data.Dataset, mode: int) -> tf.data.Dataset:
        return dataset.map(
            lambda example: {**example, "inputs": tf.concat([[mode], example["inputs"]], 0)},
            num_parallel_calls=tf.data.AUTOTUNE,
        )

    names = []
    for objective in ul2():
        if objective.kind == "span_corruption":
            corrupt = functools.partial(
                t5.span_corruption,
                mean_noise_span_length=objective.mean_noise_span_length,
                noise_density=objective.noise_density,
                reserved_for_packing=1,  # for the mode token
            )
        else:
            corrupt = t5.prefix_lm
        assert objective.mode
        mode = PIECES + SENTINELS + MODES.index(objective.mode)
        seqio.TaskRegistry.add(
            f"bench_{objective.name.replace('.', '_')}",
            source=source,
            preprocessors=[
                dense,
                corrupt,
                functools.partial(with_mode, mode=mode),
                seqio.preprocessors.append_eos_after_trim,
            ],
            output_features=features,
        )
        names.append(f"bench_{objective.name.replace('.', '_')}")
    seqio.MixtureRegistry.add("bench", names, default_rate=1.0)
    dataset = seqio.get_dataset(
        "bench",
        {"inputs": LENGTH, "targets": LENGTH},
        seqio.EncDecFeatureConverter(pack=True),
        dataset_split="train",
        shuffle=True,
        num_epochs=None,
        seed=0,
        batch_size=ROWS,
    )
    yield from dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()


PIPELINES: dict[str, Callable[[argparse.Namespace], Iterator[Mapping[str, Any]]]] = {
    "t5x_like": t5x_like_batches,
    "seqio": seqio_batches,
}
BATCHES = {"t5x_like": 60, "seqio": 6}
"""Batches per turn."""
COUNT_EVERY = {"t5x_like": 10, "seqio": 1}
"""Interval of the batches whose tokens are counted."""


def counts(batch: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the raw tokens, the positions without padding, and all token positions of a batch."""
    raw = filled = positions = 0
    for name in ("encoder_input_tokens", "decoder_target_tokens"):
        ids = batch[name]
        raw += int(((ids > 1) & (ids < SPECIAL)).sum())
        filled += int((ids > 0).sum())
        positions += ids.size
    return raw, filled, positions


def serve(name: str, options: argparse.Namespace, cores: int, pipe: Connection) -> None:
    """Make a turn of batches for each message; answer with CPU seconds, wall seconds and the counts."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    batches = PIPELINES[name](options)
    for _ in range(3 * BATCHES[name]):
        next(batches)
    pipe.send(None)
    cpu = time.process_time()
    while pipe.recv():
        wall = time.perf_counter()
        counted = []
        for number in range(BATCHES[name]):
            batch = next(batches)  # As in training, a batch is released before the next, so that its memory is reused.
            if number % COUNT_EVERY[name] == 0:
                counted.append(batch)
        wall = time.perf_counter() - wall
        counting = time.thread_time()
        total = COUNT_EVERY[name] * np.sum([counts(batch) for batch in counted], axis=0)
        counting = time.thread_time() - counting
        now = time.process_time()
        pipe.send((now - cpu - counting, wall, *map(int, total)))
        cpu = now


def compare(options: argparse.Namespace, cores: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in PIPELINES:
        pipes[name], other_end = context.Pipe()
        process = context.Process(target=serve, args=(name, options, cores, other_end), daemon=True)
        process.start()
        processes.append(process)
        pipes[name].recv()  # One pipeline at a time, so that no warm-up overlaps with a measurement.
    turns: dict[str, list[tuple[float, float, int, int, int]]] = {name: [] for name in PIPELINES}
    for _ in range(options.turns):
        for name, pipe in pipes.items():
            pipe.send(True)
            turns[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join(5)
        process.kill()  # seqio's threads may wait for a consumer.
    report: dict[str, Any] = {"cores": cores}
    speeds = {}
    for name, rows in turns.items():
        cpu, wall, raw, filled, positions = (np.array(column, np.float64) for column in zip(*rows, strict=True))
        speeds[name] = raw / cpu / 1e6
        report[name] = {
            "million_raw_tokens_per_cpu_second": round(float(np.median(speeds[name])), 3),
            "slowest_and_fastest_turn": [round(float(f(speeds[name])), 3) for f in (np.min, np.max)],
            "million_raw_tokens_per_wall_second": round(float(np.median(raw / wall / 1e6)), 3),
            "filled_fraction": round(float(filled.sum() / positions.sum()), 4),
        }
    report["ratio_of_raw_tokens_per_cpu_second"] = round(float(np.median(speeds["t5x_like"] / speeds["seqio"])), 1)
    return report


_FIRST_BATCH = """
import sys, time
from pathlib import Path
sys.path.insert(0, {folder!r})
import data_vs_seqio
from t5x_like.data.stream.row_stream import TrainingStream
data = data_vs_seqio.data_config({work!r})
TrainingStream(data_vs_seqio.stores_of(data), data, data_vs_seqio.ROWS).batch(0)
import json, resource
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({{"cpu": usage.ru_utime + usage.ru_stime, "mib": usage.ru_maxrss / 1024,
  "tensorflow": "tensorflow" in sys.modules, "jax": "jax" in sys.modules}}))
"""


def first_batch(work: Path, repetitions: int = 5) -> dict[str, Any]:
    """Measure a new process from its start to its first batch."""
    program = _FIRST_BATCH.format(folder=str(Path(__file__).parent), work=str(work))
    walls, usages = [], []
    for _ in range(repetitions):
        start = time.perf_counter()
        answer = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True).stdout
        walls.append(time.perf_counter() - start)
        usages.append(json.loads(answer))
    return {
        "wall_seconds": round(statistics.median(walls), 3),
        "cpu_seconds": round(statistics.median(each["cpu"] for each in usages), 3),
        "peak_mib": round(statistics.median(each["mib"] for each in usages)),
        "tensorflow_imported": any(each["tensorflow"] for each in usages),
        "jax_imported": any(each["jax"] for each in usages),
    }


class CountedTokens:
    """Split of 10^12 tokens that are computed from their position."""

    name = "train"
    num_tokens = 10**12
    num_documents = 10**9
    num_bytes = 4 * 10**12

    def tokens(self, start: int, stop: int) -> np.ndarray:
        return (3 + np.arange(start, stop) % (PIECES - 3)).astype(np.uint16)

    def gather(self, starts_N: np.ndarray, length: int) -> np.ndarray:
        index_NxL = starts_N[:, None] + np.arange(length)
        return (3 + index_NxL % (PIECES - 3)).astype(np.uint16)


def far_rows(work: Path, repetitions: int = 41) -> dict[str, Any]:
    """Measure the CPU seconds to open a stream and make a batch, at row 0 and at row 10^9, in turns."""
    from t5x_like.data.stream.row_stream import TrainingStream

    data = data_config(str(work))
    store: Any = copy.copy(stores_of(data)[0])
    store.split = lambda name: CountedTokens()
    seconds: dict[int, list[float]] = {0: [], 10**9: []}
    for _ in range(repetitions):
        for row, measured in seconds.items():
            start = time.thread_time()
            TrainingStream([store], data, ROWS).batch(row // ROWS)
            measured.append(time.thread_time() - start)
    near, far = (statistics.median(measured) for measured in seconds.values())
    return {
        "rows_per_epoch": sum(TrainingStream([store], data, ROWS).rows_per_epoch.values()),
        "row_0_ms": round(near * 1e3, 2),
        "row_1e9_ms": round(far * 1e3, 2),
        "ratio": round(far / near, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("build/data_benchmark"), help="directory of the prepared text"
    )
    parser.add_argument("--t5", type=Path, default=Path("build/t5"), help="directory in which t5 is installed")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--cores", type=int, nargs="*", default=[1, 2])
    options = parser.parse_args()
    if not (options.t5 / "t5" / "data" / "preprocessors.py").is_file():
        parser.error(f"{options.t5} has no t5: see above how to install it, or give the directory with --t5")
    process = multiprocessing.get_context("spawn").Process(target=prepare, args=(options.work,))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)
    report: dict[str, Any] = {"load_average": os.getloadavg()}
    report["first_batch_in_a_fresh_process"] = first_batch(options.work)
    report["far_rows"] = far_rows(options.work)
    for cores in options.cores:
        report[f"{cores}_cores"] = compare(options, cores)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
