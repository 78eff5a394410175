"""Windows per second that a host reads at random from a token store in an object store with a given latency.

    python benchmarks/object_store_reads.py --seconds 8

A server in a process of its own answers the requests of TensorStore's driver of S3 after a latency, of which every
tenth is longer (a spike). It holds a store of random ids that is larger than what is read in a run of the benchmark. A
causal LM reads windows of it through `Prefetcher`, as in training, with the settings before (one thread, 32 requests,
indices that are asked for again with each window) and those of today, by turns. The CPU seconds of both sides are
shown, because on a small machine they and not the latency are the limit.

At the end the windows per second that the shipped recipes need are printed, of a host at the data sheet's peak.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import email.utils
import multiprocessing
import os
import statistics
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

RECIPES = (
    ("t5", "h100:8"),
    ("t5:xxl", "v5p:4x4x4"),
    ("bert", "v5e:16x16"),
    ("ul2:ul2_20b", "v5p:4x4x4"),
    ("decoders:llama_8b", "v6e:16x16"),
)
SPIKE_FACTOR = 4


class Server:
    """Read-only service with S3's interface over the files of a folder; each answer takes `latency` seconds."""

    def __init__(self, folder: Path, latency: float):
        self.folder, self.latency = folder, latency
        self.count = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                lines = request.decode().split("\r\n")
                method, target, _ = lines[0].split(" ")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
                self.count += 1
                await asyncio.sleep(self.latency * (SPIKE_FACTOR if self.count % 10 == 0 else 1))
                status, extra, body = self.answer(target, headers)
                head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *extra]
                writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + (b"" if method == "HEAD" else body))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    def answer(self, target: str, headers: dict[str, str]) -> tuple[str, list[str], bytes]:
        url = urllib.parse.urlsplit(target)
        if "list-type" in (query := dict(urllib.parse.parse_qsl(url.query))):
            return "200 OK", ["Content-Type: application/xml"], self.listing(query.get("prefix", ""))
        path = self.folder / urllib.parse.unquote(url.path).removeprefix("/bucket/")
        if not path.is_file():
            return "404 Not Found", [], b""
        extra = ['ETag: "1"', f"Last-Modified: {email.utils.formatdate(0, usegmt=True)}"]
        if headers.get("if-none-match", "").strip('"') == "1":
            return "304 Not Modified", extra, b""
        size = path.stat().st_size
        if (wanted := headers.get("range")) is None:
            return "200 OK", extra, path.read_bytes()
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start = int(first) if first else size - int(last)
        stop = int(last) + 1 if first and last else size
        with open(path, "rb") as file:
            body = os.pread(file.fileno(), stop - start, start)
        return "206 Partial Content", [*extra, f"Content-Range: bytes {start}-{stop - 1}/{size}"], body

    def listing(self, prefix: str) -> bytes:
        names = sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())
        keys = "".join(
            f"<Contents><Key>{name}</Key><Size>1</Size></Contents>" for name in names if name.startswith(prefix)
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{keys}</ListBucketResult>".encode()


def serve(folder: Path, latency: float, port: Any) -> None:
    async def main() -> None:
        server = await asyncio.start_server(Server(folder, latency).handle, "127.0.0.1", 0, backlog=4096)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


def write_store(folder: Path, tokens: int) -> None:
    """Write a store of random ids with documents of 1,000 tokens."""
    from t5x_like.data.store.token_store import StoreWriter

    rng = np.random.default_rng(0)
    vocabulary = {"base_size": 32000, "num_sentinels": 100, "pad_id": 0, "eos_id": 1, "unk_id": 2}
    with StoreWriter(folder, vocab_size=32100) as writer:
        for _ in range(0, tokens, 2**24):
            ids = rng.integers(3, 32000, 2**24, dtype=np.uint16)
            writer.extend("train", ids, np.full(2**14, 2**10, np.uint64), len(ids))
        writer.append("validation", [np.full(4096, 5, np.uint16)], 4096)
        writer.commit({"vocabulary": vocabulary, "tokenizer_fingerprint": "random"})


def needs() -> Iterator[str]:
    from t5x_like.config.recipes import load_recipe
    from t5x_like.hardware.topologies import parse_topology
    from t5x_like.planning.estimate.data_reads import verdict
    from t5x_like.planning.plan import plan_run

    for name, topology in RECIPES:
        run = load_recipe(name)
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, store_dir="gs://bucket/stores"))
        try:
            reads = plan_run(run, parse_topology(topology)).reads()
        except Exception as error:
            yield f"{name} on {topology}: {str(error).splitlines()[0]}"
            continue
        yield f"{name} on {topology}: {verdict(reads) if reads else 'seqio reads the data'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds; every tenth answer takes four times this")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of a measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2**28)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--batch", type=int, default=256, help="rows of a host and step")
    parser.add_argument("--chunk", type=int, default=2**14, help="tokens of a chunk")
    parser.add_argument("--cache", type=int, default=2**29, help="bytes of the cache; small: each window is a request")
    options = parser.parse_args()
    os.environ.setdefault("AWS_ACCESS_KEY_ID", "key")
    os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "secret")

    from t5x_like.config import CausalLM, DataConfig
    from t5x_like.data.store import token_arrays, token_store
    from t5x_like.data.store.token_arrays import ReadOptions
    from t5x_like.data.store.token_store import Store
    from t5x_like.data.stream.prefetch import Prefetcher
    from t5x_like.data.stream.row_stream import TrainingStream
    from t5x_like.storage.locations import location

    spec = token_arrays._spec

    def rechecked(path: Any) -> dict[str, Any]:
        return {**spec(path), "recheck_cached_data": True}

    token_arrays.CHUNK_TOKENS = options.chunk
    token_store.IN_MEMORY_BYTES = 0
    now = DataConfig(
        layout="causal_lm",
        mixture=(CausalLM(),),
        inputs_length=0,
        targets_length=options.length,
        store_cache_bytes=options.cache,
    )
    before = dataclasses.replace(now, prefetch_threads=1, store_request_concurrency=32, store_cache_bytes=2**28)
    with tempfile.TemporaryDirectory() as temporary:
        write_store(Path(temporary) / "store", options.tokens)
        ours, theirs = multiprocessing.Pipe()
        server = multiprocessing.get_context("fork").Process(
            target=serve, args=(Path(temporary), options.latency, theirs), daemon=True
        )
        server.start()
        url = location(f"s3://bucket/store?endpoint=http://127.0.0.1:{ours.recv()}")
        measured: dict[str, list[float]] = {"before": [], "now": []}
        first = 0
        for _ in range(options.rounds):
            for name, data in (("before", before), ("now", now)):
                with mock.patch.object(token_arrays, "_spec", rechecked if name == "before" else spec):
                    stream = TrainingStream([Store.open(url, ReadOptions.of(data))], data, options.batch)
                    cpu, rows = time.process_time(), 0
                    with Prefetcher(stream, first) as batches:
                        next(batches)
                        began = time.monotonic()
                        while time.monotonic() - began < options.seconds:
                            next(batches)
                            rows += options.batch
                        elapsed = time.monotonic() - began
                first += 100 * rows  # Other windows the next time.
                measured[name].append(rows / elapsed)
                share = (time.process_time() - cpu) / elapsed
                print(f"{name}: {rows / elapsed:,.0f} windows per second, {share:.2f} CPUs of the client", flush=True)
        server.terminate()
    for name, values in measured.items():
        print(f"{name}: median {statistics.median(values):,.0f}, {min(values):,.0f} to {max(values):,.0f}")
    ratio = statistics.median(b / a for a, b in zip(measured["before"], measured["now"], strict=True))
    print(f"ratio, median of the pairs: {ratio:.1f}")
    print(*needs(), sep="\n")


if __name__ == "__main__":
    main()
