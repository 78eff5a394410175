"""Names of token stores: digests of the configuration and of the sources that a store is made from."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from t5x_like.config.corpus import CorpusConfig
from t5x_like.config.data import DataConfig
from t5x_like.config.tokenizer import TokenizerConfig
from t5x_like.data.sources.file_access import SourceFile
from t5x_like.data.store.token_store import FORMAT_VERSION, is_committed
from t5x_like.data.tokenizers.bytes import ByteTokenizer
from t5x_like.data.tokenizers.loading import configured_tokenizer, tokenizer_path
from t5x_like.errors import DataError
from t5x_like.storage import locations
from t5x_like.storage.locations import Location
from t5x_like.utils.digests import json_digest
from t5x_like.utils.json_reader import parse_json

_DIGESTS = "source_digests.json"
_DIGEST_THREADS = 8


def store_paths(data: DataConfig) -> tuple[Location, ...]:
    """Return the locations of the stores of `data.sources`, whether they exist or not.

    A store name contains a digest of the configuration and a digest of the contents of the user's files, in their
    order, and of a tokenizer file. So copies of the files, on other hosts for example, lead to the same store, and
    changed contents to a new one. The digest of a file is kept in the folder of the stores, and computed again only if
    the file's size or modification time changes. If several corpora determine the vocabulary, the digest covers all of
    them. If the user's files no longer exist, the store that was made from this configuration is used, provided that
    there is exactly one. The embedded corpus is identified by Python's version alone, since an upgraded dependency must
    not change the data of a run that is resumed.

    Raises:
      DataError: the sources are missing, and there is no store that was made from them.
    """
    sources = [share.corpus for share in data.sources]
    tokenizer_corpora = sources if len(sources) > 1 and _depends_on_corpora(data.tokenizer) else []
    return tuple(_store_path(data, corpus, tokenizer_corpora) for corpus in sources)


def _depends_on_corpora(tokenizer: TokenizerConfig) -> bool:
    """Return whether the tokenizer is trained on the corpora, or has the vocabulary of a Task among them."""
    return tokenizer.kind == "task" or tokenizer.is_trained


def _store_path(data: DataConfig, corpus: CorpusConfig, tokenizer_corpora: Sequence[CorpusConfig]) -> Location:
    uses_embedded = any(other.name == "python_docs" for other in (corpus, *tokenizer_corpora))
    config: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "corpus": corpus.described(),
        "tokenizer": dataclasses.asdict(data.tokenizer),
        # The embedded corpus is read from the running Python.
        "python": list(sys.version_info[:2]) if uses_embedded else None,
    }
    if tokenizer_corpora:
        config["tokenizer_of"] = [other.described() for other in tokenizer_corpora]
    name = f"{re.sub(r'[^A-Za-z0-9]+', '_', corpus.name)}-{json_digest(config)[:12]}"
    root = locations.location(data.store_dir)
    try:
        sources = _source_identity(corpus, data.tokenizer, root)
        if tokenizer_corpora:
            sources += [_source_identity(other, data.tokenizer, root) for other in tokenizer_corpora]
        return root / f"{name}-{json_digest(sources)[:8]}"
    except DataError:
        # A machine that trains need not have the user's files. Two candidates would be ambiguous.
        committed = [root / child for child in locations.children(root, f"{name}-") if is_committed(root / child)]
        if len(committed) != 1:
            raise
        return committed[0]


def _source_identity(corpus: CorpusConfig, tokenizer: TokenizerConfig, root: Location) -> list[Any]:
    """Return JSON values that change when the contents of the corpus's files or of the tokenizer change."""
    sources: list[Any] = []
    if corpus.files:
        from t5x_like.data.sources import text_files

        for split, files in text_files.files_of_splits(corpus).items():
            local = [file for file in files if "://" not in file.name]
            digests = iter(_content_digests(local, root / _DIGESTS))
            sources += [list(file.version) if "://" in file.name else next(digests) for file in files]
            if split in ("validation", "test"):
                sources.append(split)
    if corpus.messages_field is not None:
        sources.append(_template_digest(corpus, tokenizer))
    if corpus.generator:
        from t5x_like.data.sources import generators

        sources.append(generators.code_digest(corpus))
    if tokenizer.path and tokenizer.kind == "published":
        sources.append(configured_tokenizer(tokenizer).fingerprint)
    elif (path := tokenizer_path(tokenizer)) is not None:
        try:
            sources.append(hashlib.sha256(path.read_bytes()).hexdigest())
        except OSError as error:
            raise DataError(f"{path}: unreadable ({error.strerror}), expected a SentencePiece model") from None
    return sources


def _known_digests(record: Location) -> dict[str, list[Any]]:
    """Return the valid entries of the record, [size, modification time, digest] by path; none if it cannot be read."""
    with contextlib.suppress(OSError, ValueError, DataError):
        found = parse_json(locations.read_bytes(record) or b"{}")
        if isinstance(found, dict):
            return {
                path: entry
                for path, entry in found.items()
                if isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], str)
            }
    return {}


def _template_digest(corpus: CorpusConfig, tokenizer: TokenizerConfig) -> str:
    """Return the digest of the chat template: of a file, or of a published tokenizer."""
    from t5x_like.data.chat.encoding import load_template

    # A tokenizer that `prepare` trains has the plain template.
    own = configured_tokenizer(tokenizer) if tokenizer.path else ByteTokenizer(0)
    return hashlib.sha256(load_template(own, corpus.chat_template).source.encode()).hexdigest()[:32]


def _content_digests(files: Sequence[SourceFile], record: Location) -> list[str]:
    """Return the digest of each local file's contents.

    Args:
      files: The files.
      record: File with the size, the modification time and the digest of files by path, as they were last seen.
    """
    known = _known_digests(record)

    def digest(file: SourceFile) -> list[Any]:
        path, *times = file.version
        before = known.get(path)
        # Size and modification time decide, as in make: hashing a large corpus takes minutes.
        if before is not None and before[:2] == times:
            return before
        try:
            with open(path, "rb") as stream:
                content = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        except OSError as error:
            raise DataError(f"{path}: unreadable ({error.strerror}), expected a readable file") from None
        return [*times, content]

    with concurrent.futures.ThreadPoolExecutor(_DIGEST_THREADS) as threads:
        entries = list(threads.map(digest, files))
    found = {file.version[0]: entry for file, entry in zip(files, entries, strict=True)}
    if not found.items() <= known.items():
        # Without the record, for which the folder may not be writable, the digests are computed again.
        with contextlib.suppress(OSError, DataError):
            locations.write_bytes(record, json.dumps({**known, **found}).encode())
    return [entry[2] for entry in entries]
