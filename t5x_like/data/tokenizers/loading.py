"""Loading of tokenizers: of a configuration, of a store, and of a directory with an imported model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import assert_never

from t5x_like.config import ModelConfig
from t5x_like.config.tokenizer import TokenizerConfig
from t5x_like.data.tokenizers.bytes import ByteTokenizer
from t5x_like.data.tokenizers.published import (
    JSON_FILE,
    SENTENCEPIECE_FILES,
    has_t5_layout,
    has_tokenizer,
    load_published,
)
from t5x_like.data.tokenizers.sentencepiece import SentencePieceTokenizer
from t5x_like.data.tokenizers.tokenizer import Tokenizer
from t5x_like.data.tokenizers.vocabulary import EOS_ID, PAD_ID
from t5x_like.errors import DataError
from t5x_like.storage.mirror import local_copy
from t5x_like.utils.atomic_write import write_atomically
from t5x_like.utils.json_reader import read_json

__all__ = [
    "KEPT_MODEL",
    "has_tokenizer",
    "configured_tokenizer",
    "is_kept",
    "keep_tokenizer",
    "kept_tokenizer",
    "load_directory_tokenizer",
    "load_tokenizer",
    "stored_config",
    "tokenizer_from_model",
    "tokenizer_path",
]

_CONFIG, KEPT_MODEL = "config.json", "model"
"""Files of a kept tokenizer."""

_EXTRA_IDS = 100
"""Sentinels in T5's embedding table that its SentencePiece model does not list."""


def load_tokenizer(config: TokenizerConfig, path: Path | None) -> Tokenizer:
    """Load the tokenizer of `config`.

    Args:
      path: File of the tokenizer or, of a published one, its directory or the folder in which a run has kept it; None
        for bytes.

    Raises:
      DataError: the file is missing or is not a tokenizer.
      ConfigError: the configuration has more sentinels than the file.
    """
    if config.kind == "published":
        if path is None or not path.exists():
            raise DataError(f"data.tokenizer.path: found {path}, expected the directory or file of a published model")
        if is_kept(path) and (kept := kept_tokenizer(path)) is not None:
            return kept
        return load_published(path, config.num_sentinels)
    try:
        return tokenizer_from_model(config, path.read_bytes() if path else None, str(path))
    except OSError as error:
        raise DataError(f"{path}: unreadable ({error.strerror}), expected a SentencePiece model") from None


def configured_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Load the tokenizer of `config` from the path or URL that it names; see `load_tokenizer`."""
    return load_tokenizer(config, tokenizer_path(config))


def tokenizer_path(config: TokenizerConfig) -> Path | None:
    """Return the local path of a tokenizer, which is downloaded from a URL; None if the configuration names none."""
    return local_copy(config.path, "data.tokenizer.path") if config.path else None


def tokenizer_from_model(config: TokenizerConfig, model: bytes | None, source: str) -> Tokenizer:
    """Return the tokenizer of `config` with the contents of its model file.

    Args:
      model: `Tokenizer.model`.
      source: Name of the file in error messages.
    """
    match config.kind:
        case "bytes":
            return ByteTokenizer(config.num_sentinels)
        case "published" if model is None:
            return ByteTokenizer.published()
        case "sentencepiece" | "task" | "bpe" | "wordpiece" | "unigram" | "published":
            if model is None:
                raise DataError(
                    "data.tokenizer.path: found none, expected a SentencePiece model; `t5x-like prepare` trains one"
                )
            try:
                return _from_model(config, model, source)
            except (ValueError, RuntimeError, OSError, IndexError, KeyError) as error:
                kind = "SentencePiece model" if config.kind == "sentencepiece" else "tokenizer"
                raise DataError(f"{source}: found no {kind} ({error}), expected one") from None
        case unknown:
            assert_never(unknown)


def _from_model(config: TokenizerConfig, model: bytes, source: str) -> Tokenizer:
    if config.kind in ("sentencepiece", "task"):
        return SentencePieceTokenizer(model, config.num_sentinels, source)
    # A serialized SentencePiece model begins with the tag of its first piece.
    if config.kind == "published" and model.startswith(b"\n"):
        raise DataError(
            f"{source}: found a SentencePiece model that an earlier version kept, expected its {JSON_FILE}; prepare "
            "the store and train the run again"
        )
    # Imported on use: the package is large, and other tokenizers do not need it.
    from t5x_like.data.tokenizers.huggingface import HuggingFaceTokenizer

    return HuggingFaceTokenizer(model, config.num_sentinels, source)


def stored_config(tokenizer: Tokenizer) -> TokenizerConfig:
    """Return the configuration that recreates the tokenizer from `Tokenizer.model`, which may have no sentinels."""
    kind = "published"
    if isinstance(tokenizer, SentencePieceTokenizer):
        kind = "sentencepiece"
    if isinstance(tokenizer, ByteTokenizer) and not tokenizer.is_published:
        kind = "bytes"
    return TokenizerConfig(kind=kind, num_sentinels=tokenizer.vocabulary.num_sentinels)  # type: ignore[arg-type]


def keep_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer into a folder, unless it is there, so that a run can generate text without its store."""
    kept = kept_tokenizer(folder)
    if kept is not None and kept.fingerprint == tokenizer.fingerprint:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer.model is not None:
        (folder / KEPT_MODEL).write_bytes(tokenizer.model)
    # The folder counts as a tokenizer once this file is there.
    fields = {**dataclasses.asdict(stored_config(tokenizer)), "fingerprint": tokenizer.fingerprint}
    write_atomically(folder / _CONFIG, json.dumps(fields, indent=2) + "\n")


def is_kept(folder: Path) -> bool:
    """Return whether a folder is that of `keep_tokenizer`, and not a directory of a published model."""
    try:
        fields = read_json(folder / _CONFIG)
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and {"kind", "fingerprint"} <= fields.keys()


def kept_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer that `keep_tokenizer` wrote into a folder; None if there is none.

    Raises:
      DataError: the files are damaged.
    """
    if not (folder / _CONFIG).is_file():
        return None
    try:
        fields = read_json(folder / _CONFIG)
        fingerprint = fields.pop("fingerprint")
        model = (folder / KEPT_MODEL).read_bytes() if (folder / KEPT_MODEL).is_file() else None
        tokenizer = tokenizer_from_model(TokenizerConfig(**fields), model, str(folder))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{folder}: found no tokenizer ({error}), expected the one that training wrote") from None
    if tokenizer.fingerprint != fingerprint:
        raise DataError(
            f"{folder}: found a tokenizer with the fingerprint {tokenizer.fingerprint}, expected {fingerprint}, with "
            "which the run was trained"
        )
    return tokenizer


def load_directory_tokenizer(folder: Path, model: ModelConfig) -> Tokenizer:
    """Load the tokenizer beside a published model.

    A SentencePiece model with T5's ids is preferred to tokenizer.json, because it is faster.

    Raises:
      DataError: the folder has no tokenizer, or the tokenizer is damaged or has more ids than the model.
    """
    has_t5_ids = (model.pad_token_id, model.eos_ids) == (PAD_ID, (EOS_ID,))
    for name in SENTENCEPIECE_FILES:
        if has_t5_ids and has_t5_layout(folder / name):
            return _require_fit(_load_t5(folder / name, model), folder, model)
    if not has_tokenizer(folder):
        found = f"neither {JSON_FILE} nor a SentencePiece model ({', '.join(SENTENCEPIECE_FILES)}) nor vocab.txt"
        raise DataError(f"{folder}: found {found}, expected the model's tokenizer")
    tokenizer = load_published(folder, 0)
    names = (JSON_FILE, *SENTENCEPIECE_FILES)
    first = next((name for name in names if (folder / name).is_file()), None)
    if first in SENTENCEPIECE_FILES and model.decoder and tokenizer.eos_id not in model.eos_ids:
        found = f"a SentencePiece model whose end-of-sequence id is {tokenizer.eos_id}"
        raise DataError(f"{folder}: found {found}, expected the model's, {', '.join(map(str, model.eos_ids))}")
    return _require_fit(tokenizer, folder, model)


def _load_t5(path: Path, model: ModelConfig) -> Tokenizer:
    tokenizer = load_tokenizer(TokenizerConfig(num_sentinels=0), path)
    vocabulary = tokenizer.vocabulary
    if vocabulary.num_sentinels == 0 and model.vocab_size >= vocabulary.base_size + _EXTRA_IDS:
        tokenizer = load_tokenizer(TokenizerConfig(num_sentinels=_EXTRA_IDS), path)
    return tokenizer


def _require_fit(tokenizer: Tokenizer, folder: Path, model: ModelConfig) -> Tokenizer:
    if tokenizer.vocabulary.base_size > model.vocab_size:
        found = f"a tokenizer of {tokenizer.vocabulary.base_size:,} ids"
        raise DataError(
            f"{folder}: found {found}, expected at most {model.vocab_size:,}, the rows of the model's embedding table"
        )
    return tokenizer
