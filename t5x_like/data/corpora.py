"""Sources of documents behind one interface."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

from t5x_like.config.corpora import CorpusConfig
from t5x_like.config.errors import DataError
from t5x_like.data.documents import Document, Reading, divide
from t5x_like.data.targets import require_target
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.data.units import Unit, of_texts


def read(config: CorpusConfig, reading: Reading) -> Iterator[Document]:
    """The corpus's documents in the source's order, empty ones left out, each with its split.

    Raises:
      DataError: the source is missing, unreadable, not of the stated form, or has no text at all.
    """
    empty = True
    for document in divide(read_units(units(config), config, reading), config.validation_fraction):
        empty = False
        yield document
    if empty:
        raise no_text(config, reading)


def no_text(config: CorpusConfig, reading: Reading) -> DataError:
    counts = ", ".join(f"{count} left out: {reason}" for reason, count in sorted(reading.left_out.items()))
    told = counts or "no documents at all"
    what = "text" if config.inputs_field is None else "inputs and targets"
    return DataError(f"corpus {config.name}: found no document with {what} ({told}), expected at least one")


def units(config: CorpusConfig) -> list[Unit]:
    """The corpus in units of work, in the order of its documents.

    Raises:
      DataError: the source is missing, or not of the stated form as far as that shows without reading it.
    """
    if config.files:
        from t5x_like.data import text_files

        found = text_files.units(config)
        return found if config.max_documents is None else list(_first(found, config, config.max_documents))
    if config.tfds or config.task:
        from t5x_like.data import seqio_source

        return seqio_source.units(config)
    from t5x_like.data import python_docs

    return of_texts(python_docs.read(config.packages)[: config.max_documents])


def _first(found: Sequence[Unit], config: CorpusConfig, count: int) -> Iterator[Unit]:
    """As many units as hold the first `count` documents; the last is limited to what is left for it."""
    for unit in found:
        read = sum(1 for _ in itertools.islice(_source(unit, config, Reading(), None), count))
        yield unit if read < count else dataclasses.replace(unit, limit=count)
        count -= read
        if not count:
            return


def read_units(
    found: Iterable[Unit], config: CorpusConfig, reading: Reading, tokenizer: Tokenizer | None = None
) -> Iterator[Document]:
    """The documents of the units, without the empty ones; see `read_unit`."""
    return itertools.chain.from_iterable(read_unit(unit, config, reading, tokenizer) for unit in found)


def read_unit(
    unit: Unit, config: CorpusConfig, reading: Reading, tokenizer: Tokenizer | None = None
) -> Iterator[Document]:
    """The documents of a unit, without the empty ones, which are counted.

    Args:
      unit: One of `units(config)`.
      config: Of the corpus.
      reading: Gets what is met.
      tokenizer: Of the store; None asks for text only. Documents that bring ids of this tokenizer keep them.
    """
    for document in itertools.islice(_source(unit, config, reading, tokenizer), unit.limit):
        if document.is_blank:
            reading.left_out["empty"] += 1
            continue
        if unit.kind != "files" and document.has_text:  # Files know the line.
            require_target(document.text, document.inputs, config, lambda: f"corpus {config.name}")
        yield document


def _source(unit: Unit, config: CorpusConfig, reading: Reading, tokenizer: Tokenizer | None) -> Iterator[Document]:
    if unit.kind == "files":
        from t5x_like.data import text_files

        return text_files.read(unit, config, reading)
    if unit.kind == "texts":
        return (Document(text) for text in unit.texts)
    from t5x_like.data import seqio_source

    return seqio_source.read(unit, config, reading, tokenizer)
