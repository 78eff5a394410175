"""Shards: the tokenised documents of one work unit, kept until the store is assembled.

    000012-00.tokens    a segment: tokens, document lengths and token counts of each split, as they lie in memory
    000012.json         marker, written last: the key of the shard and the contents of its segments

A shard is reused only if its marker's key, a digest, matches the unit, tokenizer and split rule. Interrupted runs
therefore resume, and shards of another configuration are ignored.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like.config.corpus import CorpusConfig
from t5x_like.config.tokenizer import TokenizerConfig
from t5x_like.data.sources import corpus_reader
from t5x_like.data.sources.document import Document, ReadStats, content_hash
from t5x_like.data.sources.row_fields import require_few
from t5x_like.data.sources.validation_split import SplitRule
from t5x_like.data.sources.work_units import WorkUnit
from t5x_like.data.store.token_store import MODEL, StoreWriter, splits_of
from t5x_like.data.tokenizers.loading import tokenizer_from_model
from t5x_like.data.tokenizers.tokenizer import Tokenizer
from t5x_like.storage import locations
from t5x_like.utils.json_reader import parse_json

_FORMAT = 3
_BATCH_CHARACTERS = 2**21
_COUNTED_TOKENS = 2**18
"""Number of tokens that are counted together."""
_SEGMENT_TOKENS = 2**25
"""Number of tokens after which a segment is written. It bounds memory for units that cannot be divided (gzip)."""


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """All that a process must know to make the shards of a store.

    Attributes:
      folder: Location of the shards. The tokenizer's model file, if it has one, is in the parent of this folder.
      corpus: Corpus to read.
      tokenizer: Kind of the tokenizer and its number of sentinels.
      tokenizer_fingerprint: Fingerprint of the tokenizer's pieces.
      division: Rule that holds out documents.
      dtype: NumPy type of the tokens.
      code: Digest of code that decides on the documents, such as the module that registers a Task.
    """

    folder: str
    corpus: CorpusConfig
    tokenizer: TokenizerConfig
    tokenizer_fingerprint: str
    division: SplitRule
    dtype: str
    code: str = ""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> ShardJob:
        # JSON has no tuples, and the configuration has no lists.
        corpus: dict[str, Any] = {
            name: tuple(item) if isinstance(item, list) else item for name, item in value["corpus"].items()
        }
        nested = {
            "corpus": CorpusConfig(**corpus),
            "tokenizer": TokenizerConfig(**value["tokenizer"]),
            "division": SplitRule(**value["division"]),
        }
        return ShardJob(**{**value, **nested})

    def key(self, unit: WorkUnit) -> str:
        """Return a digest of all that decides the contents of the shard of `unit`; the folder is not part of it."""
        # The folder says where and not what: a store that is moved or prepared under another name keeps its shards.
        identity = {**self.to_json(), "folder": None, "unit": unit.to_json(), "format": _FORMAT}
        return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()

    def load_tokenizer(self) -> Tokenizer:
        return tokenizer_from_model(self.tokenizer, locations.read_bytes(self.model), str(self.model))

    @property
    def model(self) -> locations.Location:
        return locations.location(self.folder).parent / MODEL

    def marker(self, index: int) -> locations.Location:
        return locations.location(self.folder) / f"{index:06d}.json"

    def segment(self, index: int, number: int) -> locations.Location:
        return locations.location(self.folder) / f"{index:06d}-{number:02d}.tokens"


ProgressCallback = Callable[[int, int, int], None]
"""Receives the documents, the tokens and the amount of the unit (as `WorkUnit.size`) processed since the last call."""

MakeShards = Callable[[ShardJob, Sequence[tuple[int, WorkUnit]], ProgressCallback], None]
"""Makes the shards of (index, unit) and reports progress."""


def is_shard_complete(job: ShardJob, index: int, unit: WorkUnit) -> bool:
    """Return whether a complete shard of this unit exists."""
    return _read_marker(job, index, unit) is not None


def _read_marker(job: ShardJob, index: int, unit: WorkUnit) -> dict[str, Any] | None:
    text = locations.read_bytes(job.marker(index))
    if text is None:
        return None
    try:
        marker = parse_json(text)
    except ValueError:
        return None
    return marker if isinstance(marker, dict) and marker.get("key") == job.key(unit) else None


def make_shard(
    job: ShardJob,
    index: int,
    unit: WorkUnit,
    tokenizer: Tokenizer,
    *,
    num_threads: int = 1,
    progress: ProgressCallback | None = None,
) -> None:
    """Read, split and tokenise a unit, and write its shard.

    Args:
      job: Description of the store.
      index: Index of the unit in the corpus.
      unit: Documents to read.
      tokenizer: Tokenizer of the job.
      num_threads: Number of threads of the tokenizer.
      progress: Called after each batch of documents.

    Raises:
      DataError: the documents cannot be used.
      OSError: the shard cannot be written.
    """
    stats = ReadStats()
    source_digest = hashlib.blake2b(digest_size=16)
    segments = _SegmentWriter(job, index, tokenizer.eos_id)
    reported_position = 0
    documents = _apply_split(corpus_reader.read_unit(unit, job.corpus, stats, tokenizer), job.division)
    for batch in _batches(documents):
        num_tokens = 0
        for document, sequences in _encode(batch, job.corpus, tokenizer, num_threads):
            num_bytes = _text_bytes(document, sequences, tokenizer)
            # Documents and not tokens, so that the fingerprint of the source does not depend on the tokenizer.
            source_digest.update(f"{document.split} {num_bytes} {content_hash(document)} ".encode())
            num_tokens += segments.add(document.split or "train", sequences, num_bytes)
        segments.flush_if_large()
        if progress:
            progress(len(batch), num_tokens, stats.position - reported_position)
            reported_position = stats.position
    segments.flush()
    marker = {
        "key": job.key(unit),
        "segments": segments.written,
        "left_out": dict(stats.left_out),
        "quarantine": stats.quarantine,
        "source": source_digest.hexdigest(),
    }
    # Written last: a shard without its marker does not count.
    locations.write_bytes(job.marker(index), json.dumps(marker).encode())


def _apply_split(documents: Iterable[Document], rule: SplitRule) -> Iterator[Document]:
    for document in documents:
        yield from rule.apply(document)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield lists of documents of a few megabytes: few calls of the tokenizer, bounded memory."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.size
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(
    documents: Sequence[Document], corpus: CorpusConfig, tokenizer: Tokenizer, num_threads: int
) -> Iterator[tuple[Document, list[npt.NDArray[Any]]]]:
    """Yield each document with the ids of each of its texts; a dialogue as one or several pairs of sequences."""
    if corpus.messages_field is not None:
        from t5x_like.data.chat.encoding import DialogueEncoder

        encoder = DialogueEncoder(tokenizer, corpus)
        for document in documents:
            for sequences in encoder.sequences(document.text):
                # Count the bytes of the tokens, since the text is JSON.
                yield document._replace(text="", tokens=tuple(sequences), hash=content_hash(document)), sequences
        return
    texts = [text for document in documents if not document.tokens for text in document.texts]
    encoded = iter(tokenizer.encode_batch(texts, num_threads=num_threads) if texts else ())
    for document in documents:
        yield document, list(document.tokens) or [next(encoded) for _ in document.texts]


def _text_bytes(document: Document, sequences: Sequence[npt.NDArray[Any]], tokenizer: Tokenizer) -> int:
    """Return the number of UTF-8 bytes of the document's text, or of the text that its ids decode to."""
    if document.has_text:
        return sum(len(text) if text.isascii() else len(text.encode()) for text in document.texts)
    return sum(map(tokenizer.num_bytes, sequences))


class _SegmentWriter:
    """Collects tokenised documents and writes them one segment at a time."""

    def __init__(self, job: ShardJob, index: int, eos_id: int):
        self._job, self._index = job, index
        self._splits = splits_of(job.corpus)
        # Documents of text end in EOS. Pairs are stored without EOS, which is added when rows are made.
        self._eos = [] if job.corpus.sequences_per_document > 1 else [np.full(1, eos_id, np.int32)]
        self.written: list[dict[str, Any]] = []
        self._reset()

    def _reset(self) -> None:
        self._ids: dict[str, list[npt.NDArray[Any]]] = {split: [] for split in self._splits}
        self._lengths: dict[str, list[int]] = {split: [] for split in self._splits}
        self._bytes = dict.fromkeys(self._splits, 0)
        self._size = 0

    def add(self, split: str, sequences: Sequence[npt.NDArray[Any]], num_bytes: int) -> int:
        """Add a document with `num_bytes` bytes of text and return its number of tokens.

        `sequences` is one array for a text, to which EOS is appended, two for a pair, or three for a preference pair.
        """
        lengths = [len(ids) for ids in sequences]
        # EOS belongs to the last sequence of a document, the only one of a text.
        lengths[-1] += len(self._eos)
        self._ids[split] += [*sequences, *self._eos]
        self._lengths[split] += lengths
        self._bytes[split] += num_bytes
        self._size += sum(lengths)
        return sum(lengths)

    def flush_if_large(self) -> None:
        if self._size >= _SEGMENT_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write the collected documents as one segment: tokens, lengths and token counts of each split."""
        buffers: list[memoryview] = []
        counts = {}
        for split in self._splits:
            ids = self._ids[split]
            tokens = (
                # Narrowed while it is concatenated: no second copy of the segment in a wider type.
                np.concatenate(ids, dtype=self._job.dtype, casting="unsafe") if ids else np.zeros(0, self._job.dtype)
            )
            lengths = np.array(self._lengths[split], np.uint64)
            token_counts = _count_tokens(tokens)
            arrays = {"tokens": tokens, "lengths": lengths, "token_counts": token_counts}
            buffers += [array.data.cast("B") for array in arrays.values() if len(array)]
            # Empty arrays have no buffer but a count of 0, from which `_append` takes its offsets.
            counts[split] = {**{name: len(array) for name, array in arrays.items()}, "bytes": self._bytes[split]}
        checksum = 0
        for buffer in buffers:
            checksum = zlib.crc32(buffer, checksum)
        locations.write_bytes(self._job.segment(self._index, len(self.written)), *buffers)
        self.written.append({"splits": counts, "crc32": checksum})
        self._reset()


def _count_tokens(tokens: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Return the number of occurrences of each id up to the largest one."""
    counts = np.zeros(int(tokens.max()) + 1 if len(tokens) else 0, np.uint64)
    # `bincount` makes a copy of 64-bit integers, four times as large as the tokens: a block of it fits into the cache.
    for start in range(0, len(tokens), _COUNTED_TOKENS):
        counts += np.bincount(tokens[start : start + _COUNTED_TOKENS], minlength=len(counts)).astype(np.uint64)
    return counts


class DamagedShard(Exception):
    """The files of a shard do not match its marker; the shard must be made again."""


class StoreAssembler:
    """Appends shards to a store in the order of the corpus, each as soon as all earlier shards are complete."""

    def __init__(self, job: ShardJob, units: Sequence[WorkUnit], writer: StoreWriter):
        self._job, self._units, self._writer = job, units, writer
        self._next_index = 0
        self._source_digest = hashlib.blake2b(digest_size=16)
        self._left_out: collections.Counter[str] = collections.Counter()
        self.quarantine: list[str] = []
        """Messages of the rows that were left out because they are invalid, in the order of the corpus."""

    def advance(self) -> None:
        """Append all shards that can be appended now.

        Raises:
          DamagedShard: a shard does not match its marker; the argument is the index of the shard.
          DataError: more rows are invalid than the configuration allows.
        """
        while self._next_index < len(self._units):
            marker = _read_marker(self._job, self._next_index, self._units[self._next_index])
            if marker is None:
                return
            for number, segment in enumerate(marker["segments"]):
                data = locations.read_bytes(self._job.segment(self._next_index, number))
                # Without its marker the shard counts as missing and is made again.
                if data is None or zlib.crc32(data) != segment["crc32"]:
                    locations.remove(self._job.marker(self._next_index))
                    raise DamagedShard(self._next_index)
                _append(self._writer, data, segment["splits"], self._job.dtype)
            # In the order of the units, so that the fingerprint does not depend on which worker was first.
            self._source_digest.update(marker["source"].encode())
            self._left_out.update(marker["left_out"])
            self.quarantine += marker["quarantine"]
            if self.quarantine:
                require_few(len(self.quarantine), self._job.corpus.max_bad_records, self.quarantine[-1])
            self._next_index += 1

    def finish(self) -> dict[str, Any]:
        """Append the remaining shards and return the `source_fingerprint` and the `left_out` counts of the store.

        Raises:
          DamagedShard: a shard is missing or damaged.
        """
        self.advance()
        if self._next_index < len(self._units):
            raise DamagedShard(self._next_index)
        return {
            "source_fingerprint": self._source_digest.hexdigest(),
            "left_out": dict(sorted(self._left_out.items())),
        }


def _append(writer: StoreWriter, data: bytes, counts: dict[str, dict[str, int]], dtype: str) -> None:
    """Append the documents of a segment, whose layout `_SegmentWriter.flush` defines."""
    start = 0
    for split, count in counts.items():
        tokens = np.frombuffer(data, dtype, count["tokens"], start)
        start += tokens.nbytes
        lengths = np.frombuffer(data, np.uint64, count["lengths"], start)
        start += lengths.nbytes
        token_counts = np.frombuffer(data, np.uint64, count["token_counts"], start)
        start += token_counts.nbytes
        if len(lengths):
            writer.extend(split, tokens, lengths, count["bytes"], token_counts)
