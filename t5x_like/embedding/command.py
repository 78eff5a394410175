"""`t5x-like embed`: a file of texts to a file of vectors, in the same order."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress

from t5x_like.config import EXIT_OK, ConfigError, DataError, Problem
from t5x_like.config.model import Pooling
from t5x_like.embedding.encoders import TextEncoder, open_encoder
from t5x_like.embedding.texts import read_texts

SUFFIXES = (".npy", ".parquet")
SHORTEST = 16
"""Cells of the shortest rows; each next length that is compiled has twice as many."""
CELLS_AT_ONCE = 2**14

Vectors = npt.NDArray[np.float32]


def embed_command(
    directory: Path,
    input_path: Path,
    output: Path,
    *,
    field: str = "text",
    pooling: Pooling | None = None,
    normalize: bool | None = None,
    bidirectional: bool | None = None,
    max_length: int | None = None,
    step: int | None = None,
) -> int:
    """Embeds the texts of `input_path` with the model in `directory`.

    All input is read and checked before the model is restored. `output` is an array float32 [texts, width] (.npy), or a
    table with the columns `text` and `embedding` (.parquet); it is whole or not there.

    Args:
      directory: Of a run, or made by `t5x-like convert --from`.
      field: Of the JSON lines, that holds the text.
      pooling, normalize, bidirectional, max_length: see `encoders.open_encoder`.
      step: Checkpoint; None for the newest.

    Returns:
      The exit code.

    Raises:
      UserError: the input, the options or the model cannot be used, or the output cannot be written.
    """
    if output.suffix not in SUFFIXES:
        raise ConfigError([Problem("--output", repr(output.name), f"a name that ends in {' or '.join(SUFFIXES)}")])
    texts = read_texts(input_path, field)
    encoder = open_encoder(
        directory,
        step=step,
        pooling=pooling,
        normalize=normalize,
        bidirectional=bidirectional,
        max_length=max_length,
    )
    how = encoder.embedding
    said = f"{how.pooling} pooling, {'' if how.normalize else 'not '}normalised, up to {encoder.max_length} tokens"
    is_writer = jax.process_index() == 0
    if is_writer:
        print(f"{directory}: {encoder.width} numbers per text, {said}", file=sys.stderr)
    vectors = embed(encoder, texts, console=Console(stderr=True) if is_writer else None)
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])
        raise DataError(f"{directory}: the embedding of text {row + 1} is not finite in all its numbers")
    if is_writer:
        _write(output, texts, vectors)
        print(f"{output}: {len(texts):,} embeddings", file=sys.stderr)
    return EXIT_OK


def embed(encoder: TextEncoder, texts: Sequence[str], *, console: Console | None = None) -> Vectors:
    """[texts, width], in the order of the texts; computed by length, so that little of a batch is padding."""
    ids = encoder.encode(texts, encoder.max_length)
    out = np.empty((len(texts), encoder.width), np.float32)
    with _progress(len(texts), console) as advance:
        for length, rows in batches([len(row) for row in ids], encoder.max_length, encoder.row_shares):
            filled = [ids[row] for row in rows] + [ids[rows[0]]] * (-len(rows) % encoder.row_shares)
            whole = _rows_at_once(length, encoder.row_shares)
            if len(rows) < whole < len(ids):  # The last ones of a length: the same shape as those before.
                filled += [ids[rows[0]]] * (whole - len(filled))
            out[rows] = encoder.vectors(filled, length)[: len(rows)]
            advance(len(rows))
    return out


def batches(lengths: Sequence[int], longest: int, shares: int) -> Iterator[tuple[int, list[int]]]:
    """(cells of a row, indices of texts): the longest first, as many at once as have `CELLS_AT_ONCE` cells."""
    by_cells: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_cells.setdefault(_cells(length, longest), []).append(index)
    for cells in sorted(by_cells, reverse=True):
        size = _rows_at_once(cells, shares)
        for start in range(0, len(by_cells[cells]), size):
            yield cells, by_cells[cells][start : start + size]


def _cells(length: int, longest: int) -> int:
    cells = SHORTEST
    while cells < length:
        cells *= 2
    return min(cells, longest)


def _rows_at_once(cells: int, shares: int) -> int:
    return max(CELLS_AT_ONCE // cells // shares, 1) * shares


@contextlib.contextmanager
def _progress(total: int, console: Console | None) -> Iterator[Any]:
    if console is None or not console.is_terminal:
        yield lambda count: None
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("embedding", total=total)
        yield lambda count: progress.advance(task, count)


def _write(path: Path, texts: Sequence[str], vectors: Vectors) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        if path.suffix == ".npy":
            with open(partial, "wb") as file:
                np.save(file, vectors)
        else:
            import pyarrow
            import pyarrow.parquet

            cells = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.ravel()), vectors.shape[1])
            pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(texts), "embedding": cells}), partial)
        partial.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        partial.unlink(missing_ok=True)
