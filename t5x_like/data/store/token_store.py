"""Token stores: tokenised text as one flat array per split, with the offsets of its documents.

A store is a folder:

    info.json               counts, tokenizer, fingerprints, size and digests of each array
    tokenizer.model         the SentencePiece model, if the vocabulary has one
    train/tokens            uint16 or uint32 ids; every document ends in EOS
    train/offsets           uint64; document i is tokens[offsets[i]:offsets[i + 1]]
    train/token_counts      uint64; number of occurrences of each id
    train/packing/...       plans of packed rows, which are added later (see `stored_plan`)
    validation/...          the same
    test/...                the same, if the corpus has a test split
    COMMITTED               digest of info.json, written last

The arrays are sharded zarr3 arrays, written and read through TensorStore, with a checksum for every chunk. A store can
also be in an object store, named by its URL (see `storage.locations`).

A store of supervised pairs has `parts` 2 in its info.json: the array holds inputs_0 targets_0 inputs_1 targets_1 ...
without EOS, and `offsets` has two entries per pair. A store of preference pairs has `parts` 3: inputs, the chosen and
the rejected answer. One of pairs with n hard negatives has `parts` 2 + n; missing negatives are empty.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from t5x_like.config.corpus import CorpusConfig
from t5x_like.config.objectives import Objective
from t5x_like.config.tokenizer import TokenizerConfig
from t5x_like.data.store import stored_plan
from t5x_like.data.store.store_format import FORMAT_VERSION, KINDS, TOKEN_COUNTS, parse_info
from t5x_like.data.store.token_arrays import (
    DEFAULT_READS,
    ArrayRecord,
    ArrayWriter,
    ReadOptions,
    damaged,
    find_damage,
    open_array,
    read,
    result_of,
)
from t5x_like.data.tokenizers.vocabulary import TokenTraits, Vocabulary
from t5x_like.errors import DataError
from t5x_like.storage import locations
from t5x_like.storage.locations import Location, Url
from t5x_like.utils.atomic_write import sync_directory, sync_tree

if TYPE_CHECKING:
    from t5x_like.data.tokenizers.tokenizer import Tokenizer

SPLITS = ("train", "validation")
"""Splits that every store has; a store can also have "test"."""
IN_MEMORY_BYTES = 512 * 2**20
"""A split up to this size is read completely on first use. Of a larger one, only the chunks that a row needs are
read."""
_COMMIT_MARKER = "COMMITTED"
MODEL = "tokenizer.model"


class StoreWriter:
    """Writer of a token store.

    A local store is written to `<store>.partial/store` and renamed when it is complete. If the process dies, the
    partial folder stays, and the next writer removes what this one wrote. An object store has no rename, so its commit
    marker is written last. Leaving the `with` block without `commit` removes what was written. Only one writer may
    write a store at a time.
    """

    def __init__(
        self, path: Location, *, vocab_size: int, sequences_per_document: int = 1, splits: Sequence[str] = SPLITS
    ):
        """
        Args:
          path: Location of the store.
          vocab_size: Number of ids, which decides the type of the tokens.
          sequences_per_document: 1 for texts, each of which ends in EOS; 2 for pairs of inputs and targets; 3 for
            preference pairs, 2 + n for pairs with n hard negatives.
          splits: Splits of the store.
        """
        self._splits = tuple(splits)
        self.path = path
        self.partial = partial_of(path)
        self._write_path: Location = path if isinstance(path, Url) else self.partial / "store"
        locations.remove(self._write_path)
        if isinstance(self._write_path, Path):
            self._write_path.mkdir(parents=True)
        self.dtype = token_dtype(vocab_size)
        self._sequences_per_document = sequences_per_document
        self._tokens = {split: ArrayWriter(self._write_path / split / "tokens", self.dtype) for split in splits}
        self._offsets = {split: ArrayWriter(self._write_path / split / "offsets", "uint64") for split in splits}
        for offsets in self._offsets.values():
            offsets.append(np.zeros(1, np.uint64))
        self._token_counts = {split: np.zeros(vocab_size, np.uint64) for split in splits}
        self._ends = dict.fromkeys(splits, 0)
        self._bytes = dict.fromkeys(splits, 0)
        self._committed = False

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._committed:
            with contextlib.suppress(OSError, DataError):
                locations.remove(self._write_path)
            if isinstance(self.partial, Path):
                with contextlib.suppress(OSError):
                    self.partial.rmdir()  # Fails if it also holds shards, which are kept.

    def append(self, split: str, documents: list[npt.NDArray[Any]], text_bytes: int) -> None:
        """Append documents, each with its EOS. `text_bytes` is the number of UTF-8 bytes of their text."""
        lengths = np.array([len(document) for document in documents], np.uint64)
        self.extend(split, np.concatenate(documents), lengths, text_bytes)

    def extend(
        self,
        split: str,
        tokens: npt.NDArray[Any],
        lengths: npt.NDArray[np.uint64],
        text_bytes: int,
        token_counts: npt.NDArray[Any] | None = None,
    ) -> None:
        """Append documents that are concatenated already.

        Args:
          split: Name of the split.
          tokens: Ids below the `vocab_size` of the store.
          lengths: Number of tokens of each document; for pairs, two entries per pair.
          text_bytes: Number of UTF-8 bytes of the documents' text.
          token_counts: Number of occurrences of each id up to the largest one; None: they are counted here.
        """
        counts = np.bincount(tokens.astype(np.int64, copy=False)) if token_counts is None else token_counts
        self._token_counts[split][: len(counts)] += counts.astype(np.uint64)
        self._tokens[split].append(tokens)
        # One entry more than there are sequences: the constructor has written the first, 0.
        self._offsets[split].append(self._ends[split] + np.cumsum(lengths, dtype=np.uint64))
        self._ends[split] += int(lengths.sum())
        self._bytes[split] += text_bytes

    def commit(self, info: dict[str, Any], files: Mapping[str, bytes] = MappingProxyType({})) -> None:
        """Complete the store.

        Args:
          info: Contents of info.json, to which the format, the counts and a fingerprint of all tokens are added.
          files: Contents of further files by name, such as `MODEL`.
        """
        counts = {split: ArrayWriter(self._write_path / split / TOKEN_COUNTS, "uint64") for split in self._splits}
        for split, writer in counts.items():
            writer.append(self._token_counts[split])
        for writer in (*self._tokens.values(), *self._offsets.values(), *counts.values()):
            writer.close()
        # The fingerprint is that of the tokens, not of the sources: a store that was made again from the same text has
        # the same one.
        content = hashlib.blake2b(digest_size=16)
        for split in self._splits:
            content.update(self._tokens[split].digest.digest() + self._offsets[split].digest.digest())
        info_document = {
            "format_version": FORMAT_VERSION,
            "dtype": self.dtype,
            "parts": self._sequences_per_document,
            **info,
            "splits": {
                split: {
                    "documents": (self._offsets[split].size - 1) // self._sequences_per_document,
                    "tokens": self._tokens[split].size,
                    "bytes": self._bytes[split],
                }
                for split in self._splits
            },
            "content_fingerprint": content.hexdigest(),
            "arrays": {
                f"{split}/{name}": dataclasses.asdict(writers[split].record())
                for split in self._splits
                for name, writers in (("tokens", self._tokens), ("offsets", self._offsets), (TOKEN_COUNTS, counts))
            },
        }
        for name, data in files.items():
            locations.write_bytes(self._write_path / name, data)
        text = json.dumps(info_document, indent=2) + "\n"
        locations.write_bytes(self._write_path / "info.json", text.encode())
        # The marker comes last and holds the digest of info.json, so that a marker beside another info.json is no
        # commit.
        locations.write_bytes(self._write_path / _COMMIT_MARKER, f"{_digest(text)}\n".encode())
        if isinstance(self._write_path, Path) and isinstance(self.path, Path):
            sync_tree(self._write_path)
            if self.path.exists():
                shutil.rmtree(self.path)
            os.rename(self._write_path, self.path)
            sync_directory(self.path.parent)
        self._committed = True
        locations.remove(self.partial)


def splits_of(corpus: CorpusConfig) -> tuple[str, ...]:
    """Return the splits of the store of a corpus."""
    return (*SPLITS, "test") if corpus.has_test else SPLITS


def token_dtype(vocab_size: int) -> str:
    """Return the smallest NumPy type of a store's tokens that holds all ids."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def partial_of(path: Location) -> Location:
    """Return the folder that holds the shards and arrays of a store that is being written."""
    return path.with_name(path.name + ".partial")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def is_committed(path: Location) -> bool:
    """Return whether a complete store of this format exists at `path`."""
    return _committed_info(path) is not None


def _committed_info(path: Location) -> dict[str, Any] | None:
    try:
        text = locations.read_bytes(path / "info.json")
        marker = locations.read_bytes(path / _COMMIT_MARKER)
        if text is None or marker is None or marker.decode().strip() != _digest(text.decode()):
            return None
    except (OSError, ValueError):
        return None
    return parse_info(text, str(path / "info.json"))


class Split:
    """Split of a store: a flat array of tokens with document offsets. A small split is held in memory.

    Attributes:
      path: Location of its arrays.
      name: Its name.
      num_documents, num_tokens: Its size.
      num_bytes: Number of UTF-8 bytes of the documents' text. EOS tokens count as no bytes.
      offsets_fingerprint: Digest of the lengths of its documents.
    """

    def __init__(
        self,
        path: Location,
        name: str,
        info: dict[str, int],
        arrays: dict[str, ArrayRecord],
        vocab_size: int,
        options: ReadOptions,
    ):
        self.path = path / name
        self._options = options
        self._vocab_size = vocab_size
        self._arrays = {kind: arrays[f"{name}/{kind}"] for kind in KINDS}
        self.name = name
        self.num_documents = info["documents"]
        self.num_tokens = info["tokens"]
        self.num_bytes = info["bytes"]
        self.offsets_fingerprint = self._arrays["offsets"].content
        self._in_memory = self._arrays["tokens"].num_bytes <= IN_MEMORY_BYTES
        self.reference_log_probs: npt.NDArray[np.float32] | None = None
        """[documents, 2]: log-probabilities of the chosen and the rejected answers of preference pairs under the model
        that a run starts from. They belong to the run, not to the store: `data.stream.reference_log_probs`."""

    @functools.cached_property
    def _array(self) -> Any:
        # A split in memory is read once, and a cache would hold it twice.
        options = dataclasses.replace(self._options, cache_bytes=0) if self._in_memory else self._options
        return open_array(self.path / "tokens", self._arrays["tokens"], options)

    @property
    def is_read_by_requests(self) -> bool:
        """True if each read of tokens is a request to an object store."""
        return isinstance(self.path, Url) and not self._in_memory

    @functools.cached_property
    def _memory(self) -> npt.NDArray[Any]:
        return self._checked(read(self._array, self.path))

    def _checked(self, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the tokens; raise DataError if one of them is outside the vocabulary."""
        if tokens.size and (largest := int(tokens.max())) >= self._vocab_size:
            raise damaged(self.path, f"found the id {largest}, expected ids below {self._vocab_size:,}")
        return tokens

    @functools.cached_property
    def offsets(self) -> npt.NDArray[np.uint64]:
        """Document offsets.

        For text the shape is [documents + 1]: document i is tokens[offsets[i]:offsets[i + 1]], including its EOS. For
        pairs it is [2 * documents + 1]: inputs i are tokens[offsets[2i]:offsets[2i + 1]], and targets i follow.
        """
        offsets = read(self._offsets_array, self.path)
        if offsets[0] != 0 or offsets[-1] != self.num_tokens or (offsets[1:] < offsets[:-1]).any():
            raise damaged(self.path, f"found offsets that do not rise from 0 to {self.num_tokens:,}, its tokens")
        return offsets

    @functools.cached_property
    def _offsets_array(self) -> Any:
        return open_array(self.path / "offsets", self._arrays["offsets"])

    def offsets_of(self, first: int, last: int) -> npt.NDArray[np.uint64]:
        """Return `offsets[first : last + 1]`, without reading the others unless all are in memory."""
        if "offsets" in self.__dict__ or last - first + 1 >= self._offsets_array.shape[0]:
            return self.offsets[first : last + 1]
        return read(self._offsets_array[first : last + 1], self.path)

    @property
    def folder(self) -> Path:
        """Local folder beside the store, for temporary files."""
        return self.path.parent.parent if isinstance(self.path, Path) else Path(tempfile.gettempdir())

    def tokens(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return tokens [start, stop) of the split."""
        if self._in_memory:
            return self._memory[start:stop]
        return self._checked(read(self._array[start:stop], self.path))

    def first_tokens(self, count: int) -> npt.NDArray[Any]:
        """Return the first `count` tokens, or all if there are fewer, without reading the others."""
        return self._checked(read(self._array[: min(count, self.num_tokens)], self.path))

    def gather(self, starts_N: npt.NDArray[np.int64], length: int) -> npt.NDArray[Any]:
        """Return [N, length]: `length` tokens from each of N starts, continuing with the first token after the last."""
        if self._in_memory:
            if length <= self.num_tokens and (starts_N <= self.num_tokens - length).all():
                # No window wraps around: indexing a strided view copies whole windows, which is faster than `take`.
                return np.lib.stride_tricks.sliding_window_view(self._memory, length)[starts_N]
            return self._memory.take(starts_N[:, None] + np.arange(length), mode="wrap")
        # All reads are issued before the first result is awaited, so that TensorStore can run them in parallel.
        pending = []
        for start in starts_N.tolist():
            stop = min(start + length, self.num_tokens)
            num_wrapped = start + length - stop
            reads = [self._array[start:stop].read()]
            if num_wrapped:
                reads.append(self._array[0:num_wrapped].read())
            pending.append(reads)
        rows = [np.concatenate([result_of(read, self.path) for read in reads]) for reads in pending]
        return self._checked(np.stack(rows))

    def slices(self, ranges_NxB: npt.NDArray[np.int64]) -> list[npt.NDArray[Any]]:
        """Return the tokens [start, stop) of each of N ranges, which are read in parallel."""
        if self._in_memory:
            return [self._memory[start:stop] for start, stop in ranges_NxB.tolist()]
        pending = [self._array[start:stop].read() for start, stop in ranges_NxB.tolist()]
        return [self._checked(result_of(read, self.path)) for read in pending]

    def token_counts(self) -> npt.NDArray[np.int64]:
        """Return [vocab_size]: the number of occurrences of each id, which `prepare` has counted."""
        path = self.path / TOKEN_COUNTS
        return read(open_array(path, self._arrays[TOKEN_COUNTS]), path).astype(np.int64)


class Store:
    """Committed token store, open for reading."""

    def __init__(self, path: Location, info: dict[str, Any], options: ReadOptions = DEFAULT_READS):
        self.path = path
        self.info = info
        """Contents of info.json."""
        self.vocabulary = Vocabulary(**info["vocabulary"])
        self._arrays = {name: ArrayRecord(**record) for name, record in info["arrays"].items()}
        self._splits = {
            name: Split(path, name, info["splits"][name], self._arrays, self.vocabulary.vocab_size, options)
            for name in info["splits"]
        }
        for name, split in self._splits.items():
            # The counts and the arrays are stated apart in info.json, which may come from others.
            found = self._arrays[f"{name}/tokens"].size, self._arrays[f"{name}/offsets"].size
            expected = split.num_tokens, split.num_documents * self.sequences_per_document + 1
            if found != expected:
                raise damaged(path / "info.json", f"{name}: found arrays of sizes {found}, expected {expected}")

    def find_damage(self) -> list[str]:
        """Read everything, and return what is not as it was written."""
        problems = [
            problem for name, record in self._arrays.items() for problem in find_damage(self.path / name, record)
        ]
        for split in self._splits.values():
            problems += stored_plan.find_damage(split.path)
        try:
            _ = self.tokenizer
        except DataError as error:
            problems.append(str(error))
        return problems

    @staticmethod
    def open(path: Location, options: ReadOptions = DEFAULT_READS) -> Store:
        """Open the store at `path`.

        Raises:
          DataError: the store does not exist, is incomplete, or its info.json does not describe a store.
        """
        info = _committed_info(path)
        if info is None:
            is_partial = locations.exists(path) or locations.exists(partial_of(path))
            found = "an incomplete token store" if is_partial else "no token store"
            fix = "run `t5x-like prepare RECIPE` with the same options first"
            raise DataError(f"{path}: found {found}, expected a complete one; {fix}")
        return Store(path, info, options)

    @property
    def sequences_per_document(self) -> int:
        """1 for text, 2 for pairs of inputs and targets, 3 for inputs with a chosen and a rejected answer, 2 + n for
        pairs with n hard negatives."""
        return int(self.info["parts"])

    @property
    def fingerprint(self) -> str:
        """Digest of the tokens and of the tokenizer, which defines the meaning of their ids."""
        return _digest(f"{self.info['content_fingerprint']} {self.info['tokenizer_fingerprint']}")[:32]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        from t5x_like.data.tokenizers.loading import tokenizer_from_model

        # The stored model has no sentinels, even if the user's model file had some; the vocabulary has their number.
        sentinels = {"num_sentinels": self.vocabulary.num_sentinels}
        config = TokenizerConfig(**{**(self.info.get("tokenizer") or {}), **sentinels})
        model = locations.read_bytes(self.path / MODEL)
        tokenizer = tokenizer_from_model(config, model, str(self.path / MODEL))
        if tokenizer.fingerprint != self.info["tokenizer_fingerprint"]:
            expected = self.info["tokenizer_fingerprint"]
            raise damaged(self.path / MODEL, f"found the tokenizer {tokenizer.fingerprint}, expected {expected}")
        return tokenizer

    def traits_for(self, objectives: Iterable[Objective]) -> TokenTraits | None:
        """Return the token traits that the objectives use; None if none uses any. Then no tokenizer is loaded."""
        return self.tokenizer.traits if any(objective.needs_token_traits for objective in objectives) else None

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self._splits)

    def split(self, name: str) -> Split:
        """Return a split; raise DataError if the store has no such split."""
        if name not in self._splits:
            fix = "; set data.corpus.test_files or data.corpus.test_split" if name == "test" else ""
            raise DataError(f"{self.path}: found the splits {', '.join(self._splits)}, expected {name!r}{fix}")
        return self._splits[name]
