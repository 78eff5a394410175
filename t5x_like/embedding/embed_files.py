"""`t5x-like embed`: embed the texts of a file into a file of vectors, in the same order."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.config.model import Pooling
from t5x_like.embedding.text_encoder import TextEncoder, open_encoder
from t5x_like.errors import EXIT_OK, ConfigError, ConfigProblem, DataError
from t5x_like.text_inputs.batches import batch_rows, batches
from t5x_like.utils.atomic_write import replaced_file
from t5x_like.utils.console import Console
from t5x_like.utils.json_reader import parse_json
from t5x_like.utils.progress import RowProgress
from t5x_like.utils.sanitize import say

SUFFIXES = (".npy", ".parquet")
Vectors = npt.NDArray[np.float32]


def embed_command(
    model: CheckpointRef,
    input_path: Path,
    output: Path,
    *,
    field: str = "text",
    pooling: Pooling | None = None,
    normalize: bool | None = None,
    bidirectional: bool | None = None,
    max_length: int | None = None,
    dimensions: int | None = None,
) -> int:
    """Embed the texts of `input_path` with a model.

    All input is read and checked before the model is restored. `output` becomes an array float32 [texts, width] (.npy)
    or a table with the columns `text` and `embedding` (.parquet). It is written completely or not at all.

    Args:
      model: Directory of the model, with its step if one is named.
      field: Field of the JSON lines that holds the text.
      pooling, normalize, bidirectional, max_length, dimensions: see `text_encoder.open_encoder`.

    Returns:
      The exit code.

    Raises:
      UserError: the input, the options or the model cannot be used, or the output cannot be written.
    """
    if output.suffix not in SUFFIXES:
        raise ConfigError(
            [ConfigProblem("--output", repr(output.name), f"a name that ends in {' or '.join(SUFFIXES)}")]
        )
    texts = read_texts(input_path, field)
    encoder = open_encoder(
        model,
        pooling=pooling,
        normalize=normalize,
        bidirectional=bidirectional,
        max_length=max_length,
        dimensions=dimensions,
    )
    settings = encoder.embedding
    normalized = "normalized" if settings.normalize else "not normalized"
    summary = f"{settings.pooling} pooling, {normalized}, up to {encoder.max_length} tokens"
    is_writer = jax.process_index() == 0
    if is_writer:
        say(f"{model.path}: {encoder.width} numbers per text, {summary}", file=sys.stderr)
    vectors = embed(encoder, texts, console=Console(stderr=True) if is_writer else None)
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])
        raise DataError(f"{model.path}: the embedding of text {row + 1} is not finite in all its numbers")
    if is_writer:
        _write(output, texts, vectors)
        say(f"{output}: {len(texts):,} embeddings", file=sys.stderr)
    return EXIT_OK


def read_texts(path: Path, field: str) -> list[str]:
    """Return the texts of a file of JSON lines, in order. Empty lines are left out.

    Raises:
      DataError: the file is unreadable, has no texts, or has a line without a text in `field`, which is named.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: unreadable ({error.strerror}), expected a file of JSON lines") from None
    texts = [_text(line, field, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not texts:
        raise DataError(f'{path}: found no text, expected JSON lines like {{"{field}": "..."}}')
    return texts


def _text(line: bytes, field: str, where: str) -> str:
    expected = f"expected a JSON object with a text in {field!r}"
    try:
        fields: Any = parse_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: found invalid UTF-8 ({error}), expected UTF-8 text") from None
    except ValueError as error:
        raise DataError(f"{where}: found no JSON ({error}), {expected}") from None
    if not isinstance(fields, dict):
        raise DataError(f"{where}: found a JSON {type(fields).__name__}, {expected}")
    text = fields.get(field)
    if not isinstance(text, str):
        names = ", ".join(map(repr, fields)) or "none"
        found = f"{field!r} of type {type(text).__name__}" if field in fields else f"the fields {names}"
        raise DataError(f"{where}: found {found}, {expected}; name it by --field")
    if not text.strip():
        raise DataError(f"{where}: found a blank text in {field!r}, expected one to embed")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{where}: found half of a surrogate pair, expected text that UTF-8 can hold")
    return text


def embed(encoder: TextEncoder, texts: Sequence[str], *, console: Console | None = None) -> Vectors:
    """Return float32 [texts, width], in the order of the texts. A batch has texts of about one length: less padding."""
    ids = encoder.encode(texts, encoder.max_length)
    out = np.empty((len(texts), encoder.width), np.float32)
    # Without a console there is no display: a caller of this function has its own.
    with RowProgress(len(texts), label="embed", console=console or Console(quiet=True)) as progress:
        for length, rows in batches([len(row) for row in ids], encoder.max_length, encoder.row_shares):
            filled = [ids[row] for row in rows] + [ids[rows[0]]] * (-len(rows) % encoder.row_shares)
            whole = batch_rows(length, encoder.row_shares)
            # The last batch of a length gets the shape of the batches before it, which is compiled already.
            if len(rows) < whole < len(ids):
                filled += [ids[rows[0]]] * (whole - len(filled))
            out[rows] = encoder.vectors(filled, length)[: len(rows)]
            progress.advance(len(rows))
    return out


def _write(path: Path, texts: Sequence[str], vectors: Vectors) -> None:
    try:
        with replaced_file(path) as temporary:
            if path.suffix == ".npy":
                with open(temporary, "wb") as file:
                    np.save(file, vectors)
            else:
                import pyarrow
                import pyarrow.parquet

                rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.ravel()), vectors.shape[1])
                table = pyarrow.table({"text": pyarrow.array(texts), "embedding": rows})
                pyarrow.parquet.write_table(table, temporary)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from None
