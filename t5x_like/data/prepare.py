"""From corpora to token stores: once, resumably by redoing, and found again by what they were made from."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from t5x_like.config.corpora import CorpusConfig, TokenizerConfig
from t5x_like.config.data import DataConfig
from t5x_like.config.errors import DataError, RefusedError
from t5x_like.data import corpora, locations, parts, tokenizers, workers
from t5x_like.data.documents import Reading, plan_division
from t5x_like.data.locations import Location
from t5x_like.data.parts import Job
from t5x_like.data.progress import Meter, Report
from t5x_like.data.store import (
    FORMAT_VERSION,
    MODEL,
    SPLITS,
    Store,
    StoreWriter,
    is_committed,
    partial_of,
    token_dtype,
)
from t5x_like.data.tokenizers import SentencePieceTokenizer, Tokenizer
from t5x_like.data.units import Unit

MakeParts = Callable[[Job, Sequence[tuple[int, Unit]], Callable[[int, int, int], None]], None]
"""Makes the parts of the units; told documents, tokens and how much was read, now and then."""

TRAINING_BYTES_PER_PIECE = 500
"""Text that a SentencePiece model is trained on at most: three times as much takes three times as long and shortens
the tokens of held-out text by under 2 %."""
SMALL_BYTES = 2**25
"""A corpus up to this size is prepared in the process itself."""


def store_paths(data: DataConfig) -> tuple[Location, ...]:
    """Where the stores of the corpora of `data.sources` are, or will be.

    A name has a digest of the configuration and one of the sources: paths, sizes and times of the user's files, the
    contents of a tokenizer file; where several corpora make the vocabulary, of all of them. Changed sources make
    another store. Where the user's files are no longer there, the one store that was made from this configuration is
    taken. The embedded corpus goes by Python's version alone: an upgraded dependency must not change the data of a run
    that is to be resumed.

    Raises:
      DataError: the sources are missing and so is a store made from them.
    """
    sources = [share.corpus for share in data.sources]
    shared = sources if len(sources) > 1 and _is_of_the_corpora(data.tokenizer) else []
    return tuple(_store_path(data, corpus, shared) for corpus in sources)


def _is_of_the_corpora(tokenizer: TokenizerConfig) -> bool:
    """Trained on them, or the vocabulary of a Task among them."""
    return tokenizer.kind == "task" or _is_trained(tokenizer)


def _is_trained(tokenizer: TokenizerConfig) -> bool:
    return tokenizer.kind == "sentencepiece" and tokenizer.path is None


def _store_path(data: DataConfig, corpus: CorpusConfig, tokenizer_of: Sequence[CorpusConfig]) -> Location:
    embedded = any(read.name == "python_docs" for read in (corpus, *tokenizer_of))
    config: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "corpus": corpus.described(),
        "tokenizer": dataclasses.asdict(data.tokenizer),
        "python": list(sys.version_info[:2]) if embedded else None,
    }
    if tokenizer_of:
        config["tokenizer_of"] = [other.described() for other in tokenizer_of]
    name = f"{re.sub(r'[^A-Za-z0-9]+', '_', corpus.name)}-{_digest(config)[:12]}"
    root = locations.location(data.store)
    try:
        sources = _sources(corpus, data.tokenizer)
        if tokenizer_of:
            sources += [_sources(other, data.tokenizer) for other in tokenizer_of]
        return root / f"{name}-{_digest(sources)[:8]}"
    except DataError:
        made = [root / child for child in locations.children(root, f"{name}-") if is_committed(root / child)]
        if len(made) != 1:
            raise
        return made[0]


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


def prepare(
    data: DataConfig, report: Report = print, workers: int | None = None, make_parts: MakeParts | None = None
) -> tuple[Store, ...]:
    """Makes the token stores of `data.sources`, in their order and with one tokenizer, or finds them made.

    Killed at any moment, the next call goes on: parts that are finished are kept. Two calls at once wait for each other
    (in an object store they do not, and write the same). The files are the same bytes whatever the number of workers.

    Args:
      data: Names the corpora, the tokenizer and the folder of the stores.
      report: Gets a line now and then.
      workers: Processes that read and tokenise; None for as many as there are cores. Small corpora need none.
      make_parts: What runs the work in place of these processes, as `data.beam` does.

    Raises:
      DataError: a corpus or the tokenizer cannot be used, or a store cannot be written.
      RefusedError: the disk is full.
    """
    building = _Building(data, store_paths(data), report, workers or os.cpu_count() or 1, make_parts)
    for share, path in zip(data.sources, building.paths, strict=True):
        _prepare(building, share.corpus, path)
    return _agreeing([Store.open(path) for path in building.paths])


def _prepare(building: _Building, corpus: CorpusConfig, path: Location) -> None:
    if is_committed(path):
        building.report(f"{path}: prepared already")
        if locations.exists(partial_of(path)):  # the last call died between its last two steps
            with _lock(path, building.report):
                locations.remove(partial_of(path))
        return
    try:
        with _lock(path, building.report):
            if not is_committed(path):
                building.build(corpus, path)
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
    _require_store(data)
    return _agreeing([Store.open(path) for path in store_paths(data)])


def _require_store(data: DataConfig) -> None:
    if data.seqio is not None:
        name = data.seqio.mixture_or_task
        raise DataError(
            f"data.seqio: {name!r} is read live, so there is no prepared store; expected one here. To prepare the Task "
            "instead, name it by data.corpus.task"
        )


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
def _lock(path: Location, report: Report) -> Iterator[None]:
    """One process at a time makes a store. The system lets go of the lock when the process dies."""
    if not isinstance(path, Path):
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"{path}: another process prepares it; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Building:
    """What making the stores of a mixture has in common."""

    def __init__(
        self,
        data: DataConfig,
        paths: Sequence[Location],
        report: Report,
        workers: int,
        make_parts: MakeParts | None,
    ):
        self.paths = paths
        self.report = report
        self._data = data
        self._workers = workers
        self._make_parts = make_parts

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The one for all stores: brought along, a Task's, or trained."""
        config = self._data.tokenizer
        if config.kind == "task":
            from t5x_like.data import seqio_source

            return seqio_source.task_tokenizer([share.corpus for share in self._data.sources], config)
        if not _is_trained(config):
            return tokenizers.load(config, Path(config.path) if config.path else None)
        # What was trained for a store of this mixture, finished or not, is what would be trained again.
        for path in self.paths:
            for place in (path, partial_of(path)) if is_committed(path) else (partial_of(path),):
                if model := locations.read_bytes(place / MODEL):
                    return tokenizers.from_model(config, model, str(place / MODEL))
        return self._train(config)

    def _train(self, config: TokenizerConfig) -> Tokenizer:
        self.report(f"training a SentencePiece vocabulary of {config.vocab_size:,}")
        started = time.monotonic()
        limit = TRAINING_BYTES_PER_PIECE * config.vocab_size // len(self._data.sources)
        texts = (text for share in self._data.sources for text in _sample(_training_texts(share.corpus), limit))
        model = tokenizers.train_sentencepiece(texts, config.vocab_size)
        self.report(f"trained it in {time.monotonic() - started:.1f} s")
        return SentencePieceTokenizer(model, config.num_sentinels, "the trained model")

    def build(self, corpus: CorpusConfig, path: Location) -> None:
        self.report(f"{path}: preparing {corpus.name}")
        started = time.monotonic()
        job, units = self._plan(corpus, partial_of(path))
        while True:
            try:
                self._write(job, units, corpus, path)
                break
            except parts.DamagedPart as error:
                self.report(f"part {error} is damaged: it is made again")
        _summarise(Store.open(path), time.monotonic() - started, self.report)

    def _plan(self, corpus: CorpusConfig, partial: Location) -> tuple[Job, list[Unit]]:
        """What is to be done, and by which rule documents are held out: the first ones decide that."""
        tokenizer = self.tokenizer
        units = corpora.units(corpus)
        reading = Reading()
        documents = corpora.read_units(units, corpus, reading, tokenizer)
        first = next(documents, None)
        if first is None:
            raise corpora.no_text(corpus, reading)
        division = plan_division(itertools.chain([first], documents), corpus.validation_fraction)
        code = ""
        if corpus.task:
            from t5x_like.data import seqio_source

            code = seqio_source.code_digest(corpus)
            if note := seqio_source.note(corpus):
                self.report(note)
        job = Job(
            folder=str(_absolute(partial) / "parts"),
            corpus=corpus,
            tokenizer=_resolved(tokenizer),
            tokenizer_fingerprint=tokenizer.fingerprint,
            division=division,
            dtype=token_dtype(tokenizer.vocab_size),
            code=code,
        )
        return job, units

    def _make_missing(self, job: Job, units: Sequence[Unit], assembly: parts.Assembly) -> None:
        todo = [(index, unit) for index, unit in enumerate(units) if not parts.is_made(job, index, unit)]
        if len(todo) < len(units):
            self.report(f"going on: {len(units) - len(todo):,} of {len(units):,} parts are there")
        if not todo:
            return
        tokenizer = self.tokenizer
        if isinstance(tokenizer, SentencePieceTokenizer):  # for the workers, and for the next call
            locations.write_bytes(job.model, tokenizer.model)
        with Meter(self.report, sum(unit.size for _, unit in todo)) as meter:

            def told(documents: int, tokens: int, done: int) -> None:
                meter.add(documents, tokens, done)
                assembly.advance()

            if self._make_parts is not None:
                self._make_parts(job, todo, told)
            elif self._needs_workers(job, todo):
                workers.make_parts(job, todo, self._workers, told)
            else:
                for index, unit in todo:
                    parts.make(job, index, unit, tokenizer, num_threads=self._workers, progress=told)

    def _needs_workers(self, job: Job, todo: Sequence[tuple[int, Unit]]) -> bool:
        """Small work is done before workers have started. `memory://` is a place in this process."""
        alone = self._workers == 1 or len(todo) == 1 or job.folder.startswith("memory://")
        return not alone and sum(unit.size for _, unit in todo) >= SMALL_BYTES

    def _write(self, job: Job, units: Sequence[Unit], corpus: CorpusConfig, path: Location) -> None:
        tokenizer = self.tokenizer
        pairs = corpus.inputs_field is not None
        with StoreWriter(path, vocab_size=tokenizer.vocab_size, parts=2 if pairs else 1) as writer:
            assembly = parts.Assembly(job, units, writer)
            self._make_missing(job, units, assembly)
            info = {
                "corpus": dataclasses.asdict(corpus),
                "tokenizer": {**dataclasses.asdict(self._data.tokenizer), "kind": job.tokenizer.kind},
                "vocabulary": dataclasses.asdict(tokenizer.vocabulary),
                "tokenizer_fingerprint": tokenizer.fingerprint,
                **assembly.finish(),
            }
            model = tokenizer.model if isinstance(tokenizer, SentencePieceTokenizer) else None
            writer.commit(info, tokenizer_model=model)


def _resolved(tokenizer: Tokenizer) -> TokenizerConfig:
    """What makes the tokenizer again from its model file. That one is without the sentinels it may have had."""
    number = tokenizer.vocabulary.num_sentinels
    if isinstance(tokenizer, SentencePieceTokenizer):
        return TokenizerConfig(kind="sentencepiece", num_sentinels=number)
    return TokenizerConfig(kind="bytes", num_sentinels=number)


def _absolute(place: Location) -> Location:
    return place.absolute() if isinstance(place, Path) else place


def _summarise(store: Store, seconds: float, report: Report) -> None:
    for name in SPLITS:
        split = store.split(name)
        report(f"{name}: {split.num_documents:,} documents, {split.num_bytes:,} bytes, {split.num_tokens:,} tokens")
    for reason, count in store.info["left_out"].items():
        report(f"left out: {count:,} documents ({reason})")
    if not store.split("validation").num_tokens:
        report("no text is held out: the corpus is too small to divide")
    report(f"{store.path}: prepared in {seconds:.1f} s, vocabulary of {store.vocabulary.vocab_size:,}")


def _training_texts(corpus: CorpusConfig) -> Iterator[str]:
    documents = corpora.read(corpus, Reading())
    return (text for document in documents if document.split == "train" for text in document.texts)


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
