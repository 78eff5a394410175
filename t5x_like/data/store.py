"""Token stores: tokenised text as one flat array per split, with the offsets of its documents.

A store is a folder:

    info.json               what it is: counts, tokenizer, fingerprints
    tokenizer.model         the SentencePiece model, if the vocabulary has one
    train/tokens            uint16 or uint32 ids; every document ends in EOS
    train/offsets           uint64; document i is tokens[offsets[i]:offsets[i + 1]]
    validation/...          the same
    COMMITTED               digest of info.json, written last

The arrays are zarr3 in shards, written and read through TensorStore, with a checksum on every chunk. A store may
also be in an object store, by URL (see `locations`).

A store of supervised pairs has `parts` 2 in its info.json: the array holds inputs_0 targets_0 inputs_1 targets_1 ...
without EOS, and `offsets` has two entries per pair.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tensorstore

from t5x_like.config.corpora import TokenizerConfig
from t5x_like.config.errors import DataError
from t5x_like.config.objectives import Objective
from t5x_like.data import locations
from t5x_like.data.denoise import needs_traits
from t5x_like.data.locations import Location, Url
from t5x_like.data.vocabulary import TokenTraits, Vocabulary

if TYPE_CHECKING:
    from t5x_like.data.tokenizers import Tokenizer

FORMAT_VERSION = 2
SPLITS = ("train", "validation")
IN_MEMORY_BYTES = 512 * 2**20
"""Splits up to this size are read whole when first used; of larger ones, the chunks that a row needs."""
_SHARD = 2**24
_CHUNK = 2**14
_CACHE_BYTES = 256 * 2**20
_MARKER = "COMMITTED"
MODEL = "tokenizer.model"


def _spec(path: Location) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": locations.kvstore(path)}


def _create(path: Location, dtype: str) -> Any:
    endian = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [_CHUNK],
            "codecs": [endian, {"name": "crc32c"}],
            "index_codecs": [endian, {"name": "crc32c"}],
        },
    }
    metadata = {
        "shape": [0],
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [_SHARD]}},
        "codecs": [sharding],
    }
    spec = {**_spec(path), "metadata": metadata}
    return tensorstore.open(spec, create=True, context=locations.CONTEXT).result()


class _ArrayWriter:
    """Appends to a one-dimensional array, a whole shard at a time."""

    def __init__(self, path: Location, dtype: str):
        self._array = _create(path, dtype)
        self._dtype = np.dtype(dtype)
        self._pending: list[npt.NDArray[Any]] = []
        self._pending_size = 0
        self.size = 0
        self.digest = hashlib.blake2b(digest_size=16)

    def append(self, values: npt.NDArray[Any]) -> None:
        self._pending.append(values.astype(self._dtype, copy=False))
        self._pending_size += len(values)
        if self._pending_size >= _SHARD:
            block = np.concatenate(self._pending)
            whole = len(block) // _SHARD * _SHARD
            self._write(block[:whole])
            self._pending, self._pending_size = [block[whole:]], len(block) - whole

    def _write(self, block: npt.NDArray[Any]) -> None:
        stop = self.size + len(block)
        try:
            self._array = self._array.resize(exclusive_max=[stop]).result()
            for start in range(0, len(block), _SHARD):
                part = block[start : start + _SHARD]
                self._array[self.size + start : self.size + start + len(part)].write(part).result()
                self.digest.update(np.ascontiguousarray(part).data)
        except ValueError as error:  # TensorStore's name for whatever the file system says
            full = os.strerror(errno.ENOSPC) in str(error)
            raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from None
        self.size = stop

    def close(self) -> None:
        if self._pending_size:
            self._write(np.concatenate(self._pending))
            self._pending, self._pending_size = [], 0


class StoreWriter:
    """Writes a store.

    A folder's is written beside its final place, in `<store>.partial/store`, and moved there when it is complete; a
    process that dies leaves the partial folder, of which the next writer removes what this one wrote. An object store
    has no rename: there the marker is written last. Leaving the `with` block without `commit` removes what was written.
    Only one writer may be at work on a store at a time.
    """

    def __init__(self, path: Location, *, vocab_size: int, parts: int = 1):
        """`parts`: 1 for texts, each of which ends in EOS; 2 for pairs of inputs and targets."""
        self.path = path
        self.partial = partial_of(path)
        self._at: Location = path if isinstance(path, Url) else self.partial / "store"
        locations.remove(self._at)
        if isinstance(self._at, Path):
            self._at.mkdir(parents=True)
        self.dtype = token_dtype(vocab_size)
        self._parts = parts
        self._tokens = {split: _ArrayWriter(self._at / split / "tokens", self.dtype) for split in SPLITS}
        self._offsets = {split: _ArrayWriter(self._at / split / "offsets", "uint64") for split in SPLITS}
        for offsets in self._offsets.values():
            offsets.append(np.zeros(1, np.uint64))
        self._ends = dict.fromkeys(SPLITS, 0)
        self._bytes = dict.fromkeys(SPLITS, 0)
        self._committed = False

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._committed:
            with contextlib.suppress(OSError, DataError):
                locations.remove(self._at)
            if isinstance(self.partial, Path):
                with contextlib.suppress(OSError):
                    self.partial.rmdir()  # unless there is more in it than ours

    def append(self, split: str, documents: list[npt.NDArray[Any]], text_bytes: int) -> None:
        """Adds documents, each with its EOS, and the number of UTF-8 bytes that they were."""
        lengths = np.array([len(document) for document in documents], np.uint64)
        self.extend(split, np.concatenate(documents), lengths, text_bytes)

    def extend(self, split: str, tokens: npt.NDArray[Any], lengths: npt.NDArray[np.uint64], text_bytes: int) -> None:
        """Adds documents that are one array already; of pairs, `lengths` has two entries each."""
        self._tokens[split].append(tokens)
        self._offsets[split].append(self._ends[split] + np.cumsum(lengths, dtype=np.uint64))
        self._ends[split] += int(lengths.sum())
        self._bytes[split] += text_bytes

    def commit(self, info: dict[str, Any], *, tokenizer_model: bytes | None) -> None:
        """Completes the store. `info` gets the format, the counts and a fingerprint of all tokens added."""
        for writer in (*self._tokens.values(), *self._offsets.values()):
            writer.close()
        content = hashlib.blake2b(digest_size=16)
        for split in SPLITS:
            content.update(self._tokens[split].digest.digest() + self._offsets[split].digest.digest())
        document = {
            "format_version": FORMAT_VERSION,
            "dtype": self.dtype,
            "parts": self._parts,
            **info,
            "splits": {
                split: {
                    "documents": (self._offsets[split].size - 1) // self._parts,
                    "tokens": self._tokens[split].size,
                    "bytes": self._bytes[split],
                }
                for split in SPLITS
            },
            "content_fingerprint": content.hexdigest(),
        }
        if tokenizer_model is not None:
            locations.write_bytes(self._at / MODEL, tokenizer_model)
        text = json.dumps(document, indent=2) + "\n"
        locations.write_bytes(self._at / "info.json", text.encode())
        locations.write_bytes(self._at / _MARKER, f"{_digest(text)}\n".encode())
        if isinstance(self._at, Path) and isinstance(self.path, Path):
            _sync_files(self._at)
            if self.path.exists():
                shutil.rmtree(self.path)
            os.rename(self._at, self.path)
        self._committed = True
        locations.remove(self.partial)


def token_dtype(vocab_size: int) -> str:
    """The smallest type of a store's tokens that holds all ids."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def partial_of(path: Location) -> Location:
    """Where a store that is in the making keeps what it has so far."""
    return path.with_name(path.name + ".partial")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sync_files(folder: Path) -> None:
    """So that the marker cannot outlive a power cut that the arrays do not."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def is_committed(path: Location) -> bool:
    """Whether a complete store of this format is at `path`."""
    return _committed_info(path) is not None


def _committed_info(path: Location) -> dict[str, Any] | None:
    try:
        text = locations.read_bytes(path / "info.json")
        marker = locations.read_bytes(path / _MARKER)
        if text is None or marker is None or marker.decode().strip() != _digest(text.decode()):
            return None
        info: dict[str, Any] = json.loads(text)
        return info if info["format_version"] == FORMAT_VERSION else None
    except (OSError, ValueError, KeyError):
        return None


class Split:
    """One split of a store: a flat array of tokens, read whole if it is small."""

    def __init__(self, path: Location, name: str, info: dict[str, int], dtype: str):
        self._path = path / name
        self.name = name
        self.num_documents = info["documents"]
        self.num_tokens = info["tokens"]
        self.num_bytes = info["bytes"]
        """UTF-8 bytes of the documents' text; the EOS tokens stand for none."""
        self._in_memory = self.num_tokens * np.dtype(dtype).itemsize <= IN_MEMORY_BYTES

    @functools.cached_property
    def _array(self) -> Any:
        context = {"cache_pool": {"total_bytes_limit": 0 if self._in_memory else _CACHE_BYTES}}
        return _open(self._path / "tokens", context)

    @functools.cached_property
    def _memory(self) -> npt.NDArray[Any]:
        return _read(self._array, self._path)

    @functools.cached_property
    def offsets(self) -> npt.NDArray[np.uint64]:
        """[documents + 1]: document i is tokens[offsets[i]:offsets[i + 1]], its EOS included. Of pairs, [2 *
        documents + 1]: inputs i are tokens[offsets[2i]:offsets[2i + 1]], and its targets follow."""
        return _read(_open(self._path / "offsets", {}), self._path)

    def tokens(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Tokens [start, stop) of the split."""
        return self._memory[start:stop] if self._in_memory else _read(self._array[start:stop], self._path)

    def gather(self, starts_N: npt.NDArray[np.int64], length: int) -> npt.NDArray[Any]:
        """[N, length]: `length` tokens from each start on; beyond the last token follows the first."""
        if self._in_memory:
            if length <= self.num_tokens and (starts_N <= self.num_tokens - length).all():
                return np.lib.stride_tricks.sliding_window_view(self._memory, length)[starts_N]
            return self._memory.take(starts_N[:, None] + np.arange(length), mode="wrap")
        pieces = []
        for start in starts_N.tolist():
            stop = min(start + length, self.num_tokens)
            rest = start + length - stop
            pieces.append([self._array[start:stop].read(), *([self._array[0:rest].read()] if rest else [])])
        return np.stack([np.concatenate([_result(read, self._path) for read in reads]) for reads in pieces])

    def token_counts(self, vocab_size: int) -> npt.NDArray[np.int64]:
        """[vocab_size]: occurrences of each id."""
        counts = np.zeros(vocab_size, np.int64)
        for start in range(0, self.num_tokens, _SHARD):
            block = self.tokens(start, min(start + _SHARD, self.num_tokens))
            counts += np.bincount(block, minlength=vocab_size)
        return counts


class Store:
    """A committed store, open for reading."""

    def __init__(self, path: Location, info: dict[str, Any]):
        self.path = path
        self.info = info
        """The contents of info.json."""
        self.vocabulary = Vocabulary(**info["vocabulary"])
        self._splits = {name: Split(path, name, info["splits"][name], info["dtype"]) for name in SPLITS}

    @staticmethod
    def open(path: Location) -> Store:
        """Opens the store at `path`.

        Raises:
          DataError: there is none, or only a part of one.
        """
        info = _committed_info(path)
        if info is None:
            partial = locations.exists(path) or locations.exists(partial_of(path))
            found = "a half-written token store" if partial else "no token store"
            raise DataError(f"{path}: found {found}, expected a complete one; run `t5x-like prepare RECIPE` first")
        return Store(path, info)

    @property
    def parts(self) -> int:
        """Stretches of tokens per document: 1 for text, 2 for pairs of inputs and targets."""
        return int(self.info["parts"])

    @property
    def fingerprint(self) -> str:
        """Of the tokens and of the meaning of their ids."""
        return _digest(f"{self.info['content_fingerprint']} {self.info['tokenizer_fingerprint']}")[:32]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        from t5x_like.data import tokenizers

        # The model here is without the sentinels that its file may have brought; the vocabulary knows their number.
        sentinels = {"num_sentinels": self.vocabulary.num_sentinels}
        config = TokenizerConfig(**{**self.info["tokenizer"], **sentinels})
        model = locations.read_bytes(self.path / MODEL)
        return tokenizers.from_model(config, model, str(self.path / MODEL))

    def traits_for(self, objectives: Iterable[Objective]) -> TokenTraits | None:
        """What the objectives must know of the pieces; None, without loading the tokenizer, where none needs it."""
        return self.tokenizer.traits if any(needs_traits(objective) for objective in objectives) else None

    def split(self, name: str) -> Split:
        return self._splits[name]


def _open(path: Location, context: dict[str, Any]) -> Any:
    try:
        shared = tensorstore.Context(context, parent=locations.CONTEXT)
        return tensorstore.open(_spec(path), context=shared, read=True).result()
    except ValueError as error:
        raise DataError(f"{path}: unreadable ({error}); delete the store and run `t5x-like prepare RECIPE`") from None


def _read(array: Any, path: Location) -> npt.NDArray[Any]:
    return _result(array.read(), path)


def _result(read: Any, path: Location) -> npt.NDArray[Any]:
    try:
        return read.result()
    except (ValueError, concurrent.futures.CancelledError) as error:
        raise DataError(f"{path}: unreadable ({error}); delete the store and run `t5x-like prepare RECIPE`") from None
