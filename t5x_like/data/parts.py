"""Parts of a store: a unit of its corpus read, divided and tokenised, and kept until the store is assembled.

    000012-00.tokens    a segment: tokens and document lengths of each split, as they lie in memory
    000012.json         written last: what the part was made from, and what its segments hold

A part counts only with this marker, and only for the unit, tokenizer and division that the marker's key is a digest of:
what an interrupted call left serves the next one, what another configuration left does not.
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

from t5x_like.config.corpora import CorpusConfig, TokenizerConfig
from t5x_like.data import corpora, locations, tokenizers
from t5x_like.data.documents import Division, Document, Reading, content_hash
from t5x_like.data.store import MODEL, SPLITS, StoreWriter
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.data.units import Unit
from t5x_like.data.vocabulary import EOS_ID

_FORMAT = 1
_BATCH_CHARACTERS = 2**21
_SEGMENT_TOKENS = 2**25
"""Memory stays bounded however large a unit is: a packed file cannot be divided."""

Progress = Callable[[int, int, int], None]
"""Gets documents and tokens that were made, and how much of the unit has been read, since the last call."""


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a process must know to make the parts of a store.

    Attributes:
      folder: Where the parts are. The tokenizer's model, if it has one, is beside it.
      corpus: What is read.
      tokenizer: Its kind and number of sentinels.
      tokenizer_fingerprint: Of the pieces.
      division: Which documents are held out.
      dtype: Of the tokens.
      code: Digest of what else decides on the documents, as the module that registers a Task.
    """

    folder: str
    corpus: CorpusConfig
    tokenizer: TokenizerConfig
    tokenizer_fingerprint: str
    division: Division
    dtype: str
    code: str = ""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Job:
        corpus = value["corpus"] | {name: tuple(value["corpus"][name]) for name in ("files", "labels")}
        nested = {
            "corpus": CorpusConfig(**corpus),
            "tokenizer": TokenizerConfig(**value["tokenizer"]),
            "division": Division(**value["division"]),
        }
        return Job(**{**value, **nested})

    def key(self, unit: Unit) -> str:
        of = {**self.to_json(), "folder": None, "unit": unit.to_json(), "format": _FORMAT}
        return hashlib.blake2b(json.dumps(of, sort_keys=True).encode(), digest_size=16).hexdigest()

    def load_tokenizer(self) -> Tokenizer:
        return tokenizers.from_model(self.tokenizer, locations.read_bytes(self.model), str(self.model))

    @property
    def model(self) -> locations.Location:
        return locations.location(self.folder).parent / MODEL

    def marker(self, index: int) -> locations.Location:
        return locations.location(self.folder) / f"{index:06d}.json"

    def segment(self, index: int, number: int) -> locations.Location:
        return locations.location(self.folder) / f"{index:06d}-{number:02d}.tokens"


def is_made(job: Job, index: int, unit: Unit) -> bool:
    """Whether the part of this unit is there."""
    return _marker(job, index, unit) is not None


def _marker(job: Job, index: int, unit: Unit) -> dict[str, Any] | None:
    text = locations.read_bytes(job.marker(index))
    if text is None:
        return None
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError:
        return None
    return found if found.get("key") == job.key(unit) else None


def make(
    job: Job, index: int, unit: Unit, tokenizer: Tokenizer, *, num_threads: int = 1, progress: Progress | None = None
) -> None:
    """Makes a part.

    Args:
      job: Of the store.
      index: Place of the unit in the corpus.
      unit: What to read.
      tokenizer: Of the job.
      num_threads: Of the tokenizer.
      progress: Told now and then how far it is.

    Raises:
      DataError: the documents cannot be used.
      OSError: the part cannot be written.
    """
    reading = Reading()
    source = hashlib.blake2b(digest_size=16)
    segments = _Segments(job, index)
    told = 0
    divided = _divided(corpora.read_unit(unit, job.corpus, reading, tokenizer), job.division)
    for documents in _batches(divided):
        encoded = _encoded(documents, tokenizer, num_threads)
        tokens = 0
        for document, sides in zip(documents, encoded, strict=True):
            num_bytes = _text_bytes(document, sides, tokenizer)
            source.update(f"{document.split} {num_bytes} {content_hash(document)} ".encode())
            tokens += segments.add(document.split or "train", sides, num_bytes)
        segments.flush_if_large()
        if progress:
            progress(len(documents), tokens, reading.position - told)
            told = reading.position
    segments.flush()
    marker = {
        "key": job.key(unit),
        "segments": segments.made,
        "left_out": dict(reading.left_out),
        "source": source.hexdigest(),
    }
    locations.write_bytes(job.marker(index), json.dumps(marker).encode())


def _divided(documents: Iterable[Document], division: Division) -> Iterator[Document]:
    for document in documents:
        yield from division.parts(document)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists of some megabytes, so that calls of the tokenizer are few and memory stays bounded."""
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


def _encoded(documents: Sequence[Document], tokenizer: Tokenizer, num_threads: int) -> list[list[npt.NDArray[Any]]]:
    """Of each document, the ids of its text, or those of its inputs and of its targets."""
    texts = [text for document in documents if not document.tokens for text in document.texts]
    encoded = iter(tokenizer.encode_batch(texts, num_threads=num_threads) if texts else ())
    return [list(document.tokens) or [next(encoded) for _ in document.texts] for document in documents]


def _text_bytes(document: Document, sides: Sequence[npt.NDArray[Any]], tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the document's text, or of what its ids stand for."""
    if document.has_text:
        return sum(len(text) if text.isascii() else len(text.encode()) for text in document.texts)
    return sum(map(tokenizer.num_bytes, sides))


class _Segments:
    """Gathers documents, and writes them a segment at a time."""

    def __init__(self, job: Job, index: int):
        self._job, self._index = job, index
        self._ends = [] if job.corpus.inputs_field is not None else [np.full(1, EOS_ID, np.int32)]
        self.made: list[dict[str, Any]] = []
        self._begin()

    def _begin(self) -> None:
        self._ids: dict[str, list[npt.NDArray[Any]]] = {split: [] for split in SPLITS}
        self._lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
        self._bytes = dict.fromkeys(SPLITS, 0)
        self._size = 0

    def add(self, split: str, sides: Sequence[npt.NDArray[Any]], num_bytes: int) -> int:
        """Adds a document of so many bytes of text: one array, which gets its EOS, or of a pair two, which do not.
        Returns how many tokens these are."""
        lengths = [len(side) for side in sides]
        lengths[-1] += len(self._ends)
        self._ids[split] += [*sides, *self._ends]
        self._lengths[split] += lengths
        self._bytes[split] += num_bytes
        self._size += sum(lengths)
        return sum(lengths)

    def flush_if_large(self) -> None:
        if self._size >= _SEGMENT_TOKENS:
            self.flush()

    def flush(self) -> None:
        buffers: list[memoryview] = []
        counts = {}
        for split in SPLITS:
            ids = self._ids[split]
            tokens = (
                np.concatenate(ids, dtype=self._job.dtype, casting="unsafe") if ids else np.zeros(0, self._job.dtype)
            )
            lengths = np.array(self._lengths[split], np.uint64)
            buffers += [array.data.cast("B") for array in (tokens, lengths) if len(array)]
            counts[split] = {"tokens": len(tokens), "lengths": len(lengths), "bytes": self._bytes[split]}
        checksum = 0
        for buffer in buffers:
            checksum = zlib.crc32(buffer, checksum)
        locations.write_bytes(self._job.segment(self._index, len(self.made)), *buffers)
        self.made.append({"splits": counts, "crc32": checksum})
        self._begin()


class DamagedPart(Exception):
    """A part is not what its marker says; it is to be made again."""


class Assembly:
    """Appends parts to a store in the order of the corpus, each as soon as those before it are there."""

    def __init__(self, job: Job, units: Sequence[Unit], writer: StoreWriter):
        self._job, self._units, self._writer = job, units, writer
        self._next = 0
        self._source = hashlib.blake2b(digest_size=16)
        self._left_out: collections.Counter[str] = collections.Counter()

    def advance(self) -> None:
        """Appends what can be appended.

        Raises:
          DamagedPart: a part is not what its marker says; the argument is its index.
        """
        while self._next < len(self._units):
            marker = _marker(self._job, self._next, self._units[self._next])
            if marker is None:
                return
            for number, segment in enumerate(marker["segments"]):
                data = locations.read_bytes(self._job.segment(self._next, number))
                if data is None or zlib.crc32(data) != segment["crc32"]:
                    locations.remove(self._job.marker(self._next))
                    raise DamagedPart(self._next)
                _append(self._writer, data, segment["splits"], self._job.dtype)
            self._source.update(marker["source"].encode())
            self._left_out.update(marker["left_out"])
            self._next += 1

    def finish(self) -> dict[str, Any]:
        """Appends the rest; returns the `source_fingerprint` and what was `left_out` of the whole.

        Raises:
          DamagedPart: a part is missing or not whole.
        """
        self.advance()
        if self._next < len(self._units):
            raise DamagedPart(self._next)
        return {"source_fingerprint": self._source.hexdigest(), "left_out": dict(sorted(self._left_out.items()))}


def _append(writer: StoreWriter, data: bytes, counts: dict[str, dict[str, int]], dtype: str) -> None:
    start = 0
    for split in SPLITS:
        count = counts[split]
        tokens = np.frombuffer(data, dtype, count["tokens"], start)
        start += tokens.nbytes
        lengths = np.frombuffer(data, np.uint64, count["lengths"], start)
        start += lengths.nbytes
        if len(lengths):
            writer.extend(split, tokens, lengths, count["bytes"])
