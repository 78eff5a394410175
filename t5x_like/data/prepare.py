"""From corpora to token stores: once, resumably by redoing, and found again by what they were made from."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.progress

from t5x_like.config.corpora import CorpusConfig, TokenizerConfig
from t5x_like.config.data import DataConfig
from t5x_like.config.errors import DataError, RefusedError
from t5x_like.data import corpora, tokenizers
from t5x_like.data.documents import Document, Reading
from t5x_like.data.store import FORMAT_VERSION, SPLITS, Store, StoreWriter, is_committed
from t5x_like.data.tokenizers import SentencePieceTokenizer, Tokenizer
from t5x_like.data.vocabulary import EOS_ID

Report = Callable[[str], None]

TRAINING_BYTES_PER_PIECE = 500
"""Text that a SentencePiece model is trained on at most: three times as much takes three times as long and shortens
the tokens of held-out text by under 2 %."""
_BATCH_BYTES = 2**22
_ENCODING_THREADS = 2


def store_paths(data: DataConfig) -> tuple[Path, ...]:
    """Where the stores of the corpora of `data.sources` are, or will be.

    A name has a digest of the configuration and one of the sources: paths, sizes and times of the user's files, the
    contents of a tokenizer file; where a vocabulary is trained on several corpora, of all of them. Changed sources make
    another store. Where the user's files are no longer there, the one store that was made from this configuration is
    taken. The embedded corpus goes by Python's version alone: an upgraded dependency must not change the data of a run
    that is to be resumed.

    Raises:
      DataError: the sources are missing and so is a store made from them.
    """
    sources = [share.corpus for share in data.sources]
    shared = sources if len(sources) > 1 and _is_trained(data.tokenizer) else []
    return tuple(_store_path(data, corpus, shared) for corpus in sources)


def _is_trained(tokenizer: TokenizerConfig) -> bool:
    return tokenizer.kind == "sentencepiece" and tokenizer.path is None


def _store_path(data: DataConfig, corpus: CorpusConfig, trained_on: Sequence[CorpusConfig]) -> Path:
    config: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "corpus": dataclasses.asdict(corpus),
        "tokenizer": dataclasses.asdict(data.tokenizer),
        "python": list(sys.version_info[:2]) if "python_docs" in (corpus.name, *(c.name for c in trained_on)) else None,
    }
    if trained_on:
        config["trained_on"] = [dataclasses.asdict(other) for other in trained_on]
    name = f"{re.sub(r'[^A-Za-z0-9]+', '_', corpus.name)}-{_digest(config)[:12]}"
    root = Path(data.store)
    try:
        sources = _sources(corpus, data.tokenizer)
        if trained_on:
            sources += [_sources(other, data.tokenizer) for other in trained_on]
        return root / f"{name}-{_digest(sources)[:8]}"
    except DataError:
        made = [path for path in sorted(root.glob(f"{name}-*")) if is_committed(path)]
        if len(made) != 1:
            raise
        return made[0]


def store_path(data: DataConfig) -> Path:
    """Where the store of a single corpus is, or will be."""
    (path,) = store_paths(data)
    return path


def _sources(corpus: CorpusConfig, tokenizer: TokenizerConfig) -> list[Any]:
    sources: list[Any] = []
    if corpus.files:
        from t5x_like.data import text_files

        for path in text_files.matching(corpus.files):
            try:
                status = path.stat()
            except OSError as error:  # a link to nothing
                raise DataError(f"{path}: unreadable ({error.strerror}), expected a text file") from None
            sources.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    if tokenizer.kind == "sentencepiece" and tokenizer.path:
        path = Path(tokenizer.path)
        try:
            sources.append(hashlib.sha256(path.read_bytes()).hexdigest())
        except OSError as error:
            raise DataError(f"{path}: unreadable ({error.strerror}), expected a SentencePiece model") from None
    return sources


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def prepare(data: DataConfig, report: Report = print) -> tuple[Store, ...]:
    """Makes the token stores of `data.sources`, in their order and with one tokenizer, or finds them made.

    Interrupted at any moment, the next call starts over and leaves nothing behind; two calls at once wait for each
    other.

    Args:
      data: Names the corpora, the tokenizer and the folder of the stores.
      report: Gets a line now and then.

    Raises:
      DataError: a corpus or the tokenizer cannot be used, or a store cannot be written.
      RefusedError: the disk is full.
    """
    paths = store_paths(data)
    for share, path in zip(data.sources, paths, strict=True):
        _prepare(data, share.corpus, path, paths, report)
    return _agreeing([Store.open(path) for path in paths])


def _prepare(data: DataConfig, corpus: CorpusConfig, path: Path, paths: Sequence[Path], report: Report) -> None:
    if is_committed(path):
        report(f"{path}: prepared already")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path, report):
            if not is_committed(path):
                _build(data, corpus, path, paths, report)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            fix = "free some space or name another folder by --data.store"
            raise RefusedError(f"{path}: the disk is full; {fix}") from None
        found = f"the store cannot be written ({error.strerror or error})"
        raise DataError(f"{path}: {found}; name another folder by --data.store") from None


def open_stores(data: DataConfig) -> tuple[Store, ...]:
    """The prepared stores of `data.sources`, in their order.

    Raises:
      DataError: one is missing or half-written; the message names the command that makes it.
      RefusedError: they were not made with one tokenizer.
    """
    return _agreeing([Store.open(path) for path in store_paths(data)])


def open_store(data: DataConfig) -> Store:
    """The prepared store of a single corpus."""
    (store,) = open_stores(data)
    return store


def _agreeing(stores: Sequence[Store]) -> tuple[Store, ...]:
    """An id must mean the same text in every row of a mixture."""
    of = {store.path: (store.info["tokenizer_fingerprint"], store.vocabulary.vocab_size) for store in stores}
    if len(set(of.values())) > 1:
        found = ", ".join(f"{path} with {fingerprint} of {size:,} ids" for path, (fingerprint, size) in of.items())
        raise RefusedError(
            f"the stores of this mixture disagree: found the tokenizers {found}, expected one for all; delete those "
            "made with another and run `t5x-like prepare RECIPE`"
        )
    return tuple(stores)


@contextlib.contextmanager
def _lock(path: Path, report: Report) -> Iterator[None]:
    """One process at a time makes a store. The system lets go of the lock when the process dies."""
    with open(path.with_name(path.name + ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"{path}: another process prepares it; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(data: DataConfig, corpus: CorpusConfig, path: Path, paths: Sequence[Path], report: Report) -> None:
    report(f"{path}: preparing {corpus.name}")
    started = time.monotonic()
    tokenizer = _tokenizer(data, paths, report)
    reading = Reading()
    source = hashlib.blake2b(digest_size=16)
    with StoreWriter(path, vocab_size=tokenizer.vocab_size) as writer, _Meter(report) as meter:
        for documents in _batches(corpora.read(corpus, reading)):
            texts = [document.text for document in documents]
            encoded = tokenizer.encode_batch(texts, num_threads=_ENCODING_THREADS)
            sizes = []
            for document in documents:
                data_bytes = document.text.encode()
                source.update(f"{document.split} {len(data_bytes)} ".encode())
                source.update(data_bytes)
                sizes.append(len(data_bytes))
            for split in SPLITS:
                chosen = [index for index, document in enumerate(documents) if document.split == split]
                if chosen:
                    ended = [np.append(encoded[index], encoded[index].dtype.type(EOS_ID)) for index in chosen]
                    writer.append(split, ended, sum(sizes[index] for index in chosen))
            tokens = sum(map(len, encoded)) + len(encoded)
            meter.add(len(texts), tokens, reading.progress)
        info = {
            "corpus": dataclasses.asdict(corpus),
            "tokenizer": dataclasses.asdict(data.tokenizer),
            "vocabulary": dataclasses.asdict(tokenizer.vocabulary),
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "source_fingerprint": source.hexdigest(),
            "left_out": dict(reading.left_out),
        }
        model = tokenizer.model if isinstance(tokenizer, SentencePieceTokenizer) else None
        writer.commit(info, tokenizer_model=model)
    _summarise(Store.open(path), time.monotonic() - started, report)


def _summarise(store: Store, seconds: float, report: Report) -> None:
    for name in SPLITS:
        split = store.split(name)
        report(f"{name}: {split.num_documents:,} documents, {split.num_bytes:,} bytes, {split.num_tokens:,} tokens")
    for reason, count in store.info["left_out"].items():
        report(f"left out: {count:,} documents ({reason})")
    if not store.split("validation").num_tokens:
        report("no text is held out: the corpus is too small to divide")
    report(f"{store.path}: prepared in {seconds:.1f} s, vocabulary of {store.vocabulary.vocab_size:,}")


def _tokenizer(data: DataConfig, paths: Sequence[Path], report: Report) -> Tokenizer:
    config = data.tokenizer
    if not _is_trained(config):
        return tokenizers.load(config, Path(config.path) if config.path else None)
    for path in paths:  # a store of the same mixture that is there has what is to be trained
        if is_committed(path):
            return Store.open(path).tokenizer
    report(f"training a SentencePiece vocabulary of {config.vocab_size:,}")
    started = time.monotonic()
    limit = TRAINING_BYTES_PER_PIECE * config.vocab_size // len(data.sources)
    texts = (text for share in data.sources for text in _sample(_training_texts(share.corpus), limit))
    model = tokenizers.train_sentencepiece(texts, config.vocab_size)
    report(f"trained it in {time.monotonic() - started:.1f} s")
    return SentencePieceTokenizer(model, config.num_sentinels, "the trained model")


def _training_texts(corpus: CorpusConfig) -> Iterator[str]:
    return (document.text for document in corpora.read(corpus, Reading()) if document.split == "train")


def _sample(texts: Iterable[str], limit: int) -> Iterator[str]:
    """About `limit` bytes: of the first 16 times as much text, every so-manieth stretch of lines."""
    read = list(_until(texts, 16 * limit))
    total = sum(map(len, read))
    if total <= limit:
        yield from read
        return
    stretch = 2000
    every = -(-total // limit)
    parts = (text[start : start + stretch] for text in read for start in range(0, len(text), stretch))
    yield from itertools.islice(parts, 0, None, every)


def _until(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        if limit <= 0:
            return
        yield text[:limit]
        limit -= len(text)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists of some megabytes, so that encoding them in parallel pays and memory stays bounded."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Meter:
    """Shows how far and how fast it goes: a live bar on a terminal, or else a line every few seconds."""

    def __init__(self, report: Report, every_seconds: float = 5.0):
        self._report = report
        self._every = every_seconds
        self._start = self._last = time.monotonic()
        self._documents = self._tokens = 0
        self._bar: rich.progress.Progress | None = None

    def __enter__(self) -> _Meter:
        console = rich.console.Console(stderr=True)
        if console.is_terminal:
            columns = ("{task.description}", rich.progress.BarColumn(), rich.progress.TimeRemainingColumn())
            self._bar = rich.progress.Progress(*columns, console=console, transient=True)
            self._bar.add_task("", total=None)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def add(self, documents: int, tokens: int, progress: float | None) -> None:
        self._documents += documents
        self._tokens += tokens
        now = time.monotonic()
        elapsed = max(now - self._start, 1e-3)
        text = f"{self._documents:,} documents, {self._tokens:,} tokens, {self._tokens / elapsed:,.0f} tokens/s"
        if self._bar:
            total = None if progress is None else 1.0
            self._bar.update(self._bar.task_ids[0], description=text, total=total, completed=progress or 0.0)
        elif now - self._last >= self._every:
            self._last = now
            self._report(text + (f", {elapsed / progress - elapsed:,.0f} s left" if progress else ""))
