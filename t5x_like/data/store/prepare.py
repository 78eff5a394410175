"""Preparation of token stores from corpora.

A store is made once and found again by digests of its configuration and sources. Interrupted preparation is resumed:
complete shards are kept, and the others are made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from t5x_like.config.corpus import CorpusConfig
from t5x_like.config.data import DataConfig
from t5x_like.config.tokenizer import TokenizerConfig
from t5x_like.data.sources import corpus_reader
from t5x_like.data.sources.document import ReadStats
from t5x_like.data.sources.row_fields import QUARANTINED
from t5x_like.data.sources.validation_split import plan_split
from t5x_like.data.sources.work_units import WorkUnit
from t5x_like.data.store import shards, worker_pool
from t5x_like.data.store.shards import MakeShards, ShardJob
from t5x_like.data.store.store_lock import store_lock
from t5x_like.data.store.store_paths import store_paths
from t5x_like.data.store.token_arrays import ReadOptions
from t5x_like.data.store.token_store import (
    MODEL,
    Store,
    StoreWriter,
    is_committed,
    partial_of,
    splits_of,
    token_dtype,
)
from t5x_like.data.store.vocabulary_sample import sample_texts
from t5x_like.data.stream.packing_planner import PackingPlanner
from t5x_like.data.stream.row_stream import corpus_key
from t5x_like.data.stream.vocabulary_checks import check_objectives
from t5x_like.data.tokenizers.loading import configured_tokenizer, stored_config, tokenizer_from_model
from t5x_like.data.tokenizers.tokenizer import Tokenizer
from t5x_like.data.tokenizers.train_vocabulary import train_vocabulary
from t5x_like.errors import DataError, SafetyError
from t5x_like.storage import locations
from t5x_like.storage.locations import AccessError, Location
from t5x_like.utils.progress import ProgressDisplay
from t5x_like.utils.sanitize import say

Report = Callable[[str], None]
"""Receives one line of text."""

TRAINING_BYTES_PER_PIECE = 500
"""Maximum bytes of training text per piece of a SentencePiece model. Three times as much text takes three times as long
and reduces the number of tokens of held-out text by less than 2 %."""
_DESCRIBED_TOKENS = 2**16
QUARANTINE = "quarantine.jsonl"
"""File of a store that lists the rows that were left out because they are invalid."""
LINE_SECONDS = 5.0
"""Time between two lines of progress without a terminal."""
_TRAINED_NAMES = {"sentencepiece": "SentencePiece", "bpe": "BPE", "wordpiece": "WordPiece", "unigram": "Unigram"}
SMALL_BYTES = 2**25
"""A corpus up to this size is prepared without worker processes."""


def prepare(
    data: DataConfig, report: Report = say, workers: int | None = None, make_shards: MakeShards | None = None
) -> tuple[Store, ...]:
    """Make the token stores of `data.sources` with one tokenizer, and return them in the order of the sources.

    The packing plans of corpora whose examples are documents are stored beside them. Existing stores are opened. After
    an interruption at any time the next call resumes: complete shards are kept. Of two simultaneous calls, one waits
    for the other. The files have the same bytes whatever the number of workers.

    Args:
      data: Corpora, tokenizer and folder of the stores.
      report: Receives lines about the progress.
      workers: Number of processes that read and tokenise; None for the number of cores. Small corpora use none.
      make_shards: Function that replaces the processes; see `beam_runner.beam_shard_maker`.

    Raises:
      DataError: a corpus or the tokenizer is unusable, or a store cannot be written.
      SafetyError: the disk is full.
    """
    builder = _StoreBuilder(data, store_paths(data), report, workers or os.cpu_count() or 1, make_shards)
    for share, path in zip(data.sources, builder.paths, strict=True):
        with _told_errors(path):
            _prepare(builder, share.corpus, path)
    stores = _require_same_tokenizer([Store.open(path, ReadOptions.of(data)) for path in builder.paths])
    for index, store in enumerate(stores):
        with _told_errors(store.path):
            _store_plan(data, index, store, report)
    return stores


@contextlib.contextmanager
def _told_errors(path: Location) -> Iterator[None]:
    """Raise the error for the user in place of one of the file system."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "free some space or set --data.store-dir to another folder"
            raise SafetyError(f"{path}: the disk is full; {fix}") from None
        message = f"the store cannot be written ({error.strerror or error})"
        raise DataError(f"{path}: {message}; set --data.store-dir to another folder") from None


def _prepare(builder: _StoreBuilder, corpus: CorpusConfig, path: Location) -> None:
    if is_committed(path):
        builder.report(f"{path}: already prepared")
        if locations.exists(partial_of(path)):  # A previous call died between the commit and the removal.
            with store_lock(path, builder.report):
                locations.remove(partial_of(path))
        return
    with store_lock(path, builder.report):
        # Checked again: the process that held the lock before may have made the store.
        if not is_committed(path):
            builder.build(corpus, path)


def _store_plan(data: DataConfig, index: int, store: Store, report: Report) -> None:
    """Store the packing plan of the training split of a corpus whose examples are documents."""
    share = data.sources[index]
    if data.examples_of(share) != "documents":
        return
    split = store.split("train")
    check_objectives(data, store.vocabulary)
    objectives = data.objectives_of(share)
    planner = PackingPlanner(split, store.sequences_per_document, data, objectives, corpus_key(data, index))
    if planner.is_stored() or not split.num_documents:
        return
    try:
        display = ProgressDisplay(split.num_documents, "packing", report=report, interval_seconds=LINE_SECONDS)
        with store_lock(store.path, report), display:
            # Checked again: the process that held the lock before may have stored the plan.
            if not planner.is_stored():
                totals = planner.store(display)
                seconds = display.seconds
                report(f"{split.path}: packed {totals.examples:,} examples in {totals.rows:,} rows in {seconds:.1f} s")
    except (OSError, AccessError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        # A store that others have made can be read only.
        report(f"{split.path}: the packing plan cannot be stored ({error}), and is made at each start")


def open_stores(data: DataConfig) -> tuple[Store, ...]:
    """Open the prepared stores of `data.sources`, in the order of the sources.

    Raises:
      DataError: a store is missing or incomplete; the message names the command that makes it.
      SafetyError: the stores were made with different tokenizers.
    """
    _require_prepared_data(data)
    return _require_same_tokenizer([Store.open(path, ReadOptions.of(data)) for path in store_paths(data)])


def verify_stores(data: DataConfig, report: Report = say) -> None:
    """Read the prepared stores of `data.sources` completely and compare them with their digests.

    Raises:
      DataError: a store is missing, incomplete or damaged; all damage is listed.
      SafetyError: the stores were made with different tokenizers.
    """
    problems = []
    for store in open_stores(data):
        found = store.find_damage()
        problems += found
        if not found:
            report(f"{store.path}: intact, {sum(split['tokens'] for split in store.info['splits'].values()):,} tokens")
    if problems:
        raise DataError("\n".join(problems))


def _require_prepared_data(data: DataConfig) -> None:
    if data.seqio is not None:
        name = data.seqio.mixture_or_task
        raise DataError(
            f"data.seqio: {name!r} is read live, so there is no prepared store; this command needs one. To prepare the "
            "Task instead, set data.corpus.task"
        )


def _require_same_tokenizer(stores: Sequence[Store]) -> tuple[Store, ...]:
    """Raise SafetyError if the stores have different tokenizers: an id must mean the same in every row of a mixture."""
    identities = {store.path: (store.info["tokenizer_fingerprint"], store.vocabulary.vocab_size) for store in stores}
    if len(set(identities.values())) > 1:
        found = ", ".join(
            f"{path} with {fingerprint} of {size:,} ids" for path, (fingerprint, size) in identities.items()
        )
        raise SafetyError(
            f"the stores of this mixture disagree: found the tokenizers {found}, expected one for all; delete the "
            "stores that were made with another tokenizer and run `t5x-like prepare RECIPE`"
        )
    return tuple(stores)


class _StoreBuilder:
    """Builds the stores of a mixture, which share one tokenizer."""

    def __init__(
        self,
        data: DataConfig,
        paths: Sequence[Location],
        report: Report,
        workers: int,
        make_shards: MakeShards | None,
    ):
        self.paths = paths
        self.report = report
        self._data = data
        self._workers = workers
        self._make_shards = make_shards

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of all stores: loaded from a file, taken from a Task, or trained."""
        config = self._data.tokenizer
        if config.kind == "task":
            from t5x_like.data.sources import tfds_and_seqio

            return tfds_and_seqio.task_tokenizer([share.corpus for share in self._data.sources], config)
        if not config.is_trained:
            return configured_tokenizer(config)
        # A model that was trained for a store of this mixture, complete or not, equals the one that training would
        # give.
        for path in self.paths:
            for folder in (path, partial_of(path)) if is_committed(path) else (partial_of(path),):
                if model := locations.read_bytes(folder / MODEL):
                    return tokenizer_from_model(config, model, str(folder / MODEL))
        return self._train(config)

    def _train(self, config: TokenizerConfig) -> Tokenizer:
        self.report(f"training a {_TRAINED_NAMES[config.kind]} vocabulary of {config.vocab_size:,}")
        started = time.monotonic()
        # Equal shares, whatever the rates: a small corpus would otherwise have no pieces of its own.
        limit = TRAINING_BYTES_PER_PIECE * config.vocab_size // len(self._data.sources)
        texts = [text for share in self._data.sources for text in sample_texts(share.corpus, limit)]
        model = train_vocabulary(config.kind, texts, config.vocab_size)
        self.report(f"trained the vocabulary in {time.monotonic() - started:.1f} s")
        return tokenizer_from_model(config, model, "the trained model")

    def build(self, corpus: CorpusConfig, path: Location) -> None:
        self.report(f"{path}: preparing {corpus.name}")
        started = time.monotonic()
        job, units = self._plan(corpus, partial_of(path))
        # A shard that was damaged loses its marker, so each further round makes only this shard again.
        while True:
            try:
                self._write(job, units, corpus, path)
                break
            except shards.DamagedShard as error:
                self.report(f"shard {error} is damaged and is made again")
        _report_summary(Store.open(path), self.tokenizer, time.monotonic() - started, self.report)

    def _plan(self, corpus: CorpusConfig, partial: Location) -> tuple[ShardJob, list[WorkUnit]]:
        """Return the job and the work units of a store. The first documents decide the hold-out rule."""
        tokenizer = self.tokenizer
        units = corpus_reader.list_work_units(corpus)
        stats = ReadStats()
        documents = corpus_reader.read_units(units, corpus, stats, tokenizer)
        # Read before anything is written: a corpus without text leaves no store behind.
        first = next(documents, None)
        if first is None:
            raise corpus_reader.no_text_error(corpus, stats)
        rule = plan_split(itertools.chain([first], documents), corpus.validation_fraction)
        code = ""
        if corpus.task:
            from t5x_like.data.sources import tfds_and_seqio

            code = tfds_and_seqio.code_digest(corpus)
            if note := tfds_and_seqio.mixture_note(corpus):
                self.report(note)
        job = ShardJob(
            folder=str(_absolute(partial) / "parts"),
            corpus=corpus,
            tokenizer=stored_config(tokenizer),
            tokenizer_fingerprint=tokenizer.fingerprint,
            division=rule,
            dtype=token_dtype(tokenizer.vocab_size),
            code=code,
        )
        return job, units

    def _make_missing(self, job: ShardJob, units: Sequence[WorkUnit], assembler: shards.StoreAssembler) -> None:
        # Complete shards are recognized by their key, not by their name: another configuration has the same numbers.
        todo = [(index, unit) for index, unit in enumerate(units) if not shards.is_shard_complete(job, index, unit)]
        if len(todo) < len(units):
            self.report(f"resuming: {len(units) - len(todo):,} of {len(units):,} shards exist")
        if not todo:
            return
        tokenizer = self.tokenizer
        if tokenizer.model is not None:  # For the workers, and for the next call.
            locations.write_bytes(job.model, tokenizer.model)
        total = sum(unit.size for _, unit in todo)
        with ProgressDisplay(total, "preparing", report=self.report, interval_seconds=LINE_SECONDS) as display:
            num_documents = num_tokens = 0

            def progress(documents: int, tokens: int, amount: int) -> None:
                nonlocal num_documents, num_tokens
                num_documents, num_tokens = num_documents + documents, num_tokens + tokens
                rate = num_tokens / display.seconds
                display.advance(amount, f"{num_documents:,} documents, {num_tokens:,} tokens, {rate:,.0f} tokens/s")
                assembler.advance()

            if self._make_shards is not None:
                self._make_shards(job, todo, progress)
            elif self._needs_workers(job, todo):
                worker_pool.make_shards(job, todo, self._workers, progress)
            else:
                for index, unit in todo:
                    shards.make_shard(job, index, unit, tokenizer, num_threads=self._workers, progress=progress)

    def _needs_workers(self, job: ShardJob, todo: Sequence[tuple[int, WorkUnit]]) -> bool:
        """Return whether worker processes pay off: starting them takes longer than a small corpus needs.

        `memory://` exists in this process only.
        """
        single = self._workers == 1 or len(todo) == 1 or job.folder.startswith("memory://")
        return not single and sum(unit.size for _, unit in todo) >= SMALL_BYTES

    def _write(self, job: ShardJob, units: Sequence[WorkUnit], corpus: CorpusConfig, path: Location) -> None:
        tokenizer = self.tokenizer
        with StoreWriter(
            path,
            vocab_size=tokenizer.vocab_size,
            sequences_per_document=corpus.sequences_per_document,
            splits=splits_of(corpus),
        ) as writer:
            assembler = shards.StoreAssembler(job, units, writer)
            self._make_missing(job, units, assembler)
            info = {
                "corpus": dataclasses.asdict(corpus),
                "tokenizer": {**dataclasses.asdict(self._data.tokenizer), "kind": job.tokenizer.kind},
                "vocabulary": dataclasses.asdict(tokenizer.vocabulary),
                "tokenizer_fingerprint": tokenizer.fingerprint,
                **assembler.finish(),
            }
            files = {MODEL: tokenizer.model, QUARANTINE: _quarantine(assembler.quarantine)}
            writer.commit(info, {name: data for name, data in files.items() if data is not None})


def _quarantine(messages: Sequence[str]) -> bytes | None:
    """Return the contents of `QUARANTINE`, one JSON object per invalid row; None without any."""
    return "".join(json.dumps({"error": message}) + "\n" for message in messages).encode() or None


def _absolute(path: Location) -> Location:
    return path.absolute() if isinstance(path, Path) else path


def _report_summary(store: Store, tokenizer: Tokenizer, seconds: float, report: Report) -> None:
    for name in store.splits:
        split = store.split(name)
        report(f"{name}: {split.num_documents:,} documents, {split.num_bytes:,} bytes, {split.num_tokens:,} tokens")
    for reason, count in store.info["left_out"].items():
        listed = f"; {QUARANTINE} lists them" if reason == QUARANTINED else ""
        report(f"left out: {count:,} documents ({reason}{listed})")
    if not store.split("validation").num_tokens:
        report("no text is held out: the corpus is too small to be split")
    report(_describe_tokens(store, tokenizer))
    report(f"{store.path}: prepared in {seconds:.1f} s, vocabulary of {store.vocabulary.vocab_size:,}")


def _describe_tokens(store: Store, tokenizer: Tokenizer) -> str:
    """Return how well the tokenizer fits the corpus, by the first tokens of the training split."""
    split, vocabulary = store.split("train"), store.vocabulary
    tokens = split.first_tokens(_DESCRIBED_TOKENS)
    text = tokens[tokens != vocabulary.eos_id]
    words = len(tokenizer.decode(text.tolist()).split())
    unknown = 0.0 if vocabulary.unk_id is None else 100 * float((text == vocabulary.unk_id).mean() if len(text) else 0)
    return (
        f"tokenizer: {len(text) / max(words, 1):.2f} tokens per word, "
        f"{split.num_bytes / max(split.num_tokens, 1):.2f} bytes per token, {unknown:.3g} % unknown"
    )
