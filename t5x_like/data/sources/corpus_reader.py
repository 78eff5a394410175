"""Corpus reader: one interface to all sources of documents."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import assert_never

from t5x_like.config.corpus import CorpusConfig
from t5x_like.data.sources.document import Document, ReadStats
from t5x_like.data.sources.label_validation import validate_target
from t5x_like.data.sources.source_splits import source_splits
from t5x_like.data.sources.validation_split import assign_splits
from t5x_like.data.sources.work_units import WorkUnit, units_of_texts
from t5x_like.data.tokenizers.tokenizer import Tokenizer
from t5x_like.errors import DataError


def read_corpus(config: CorpusConfig, stats: ReadStats) -> Iterator[Document]:
    """Yield the non-empty documents of a corpus in the order of its source, each with its split.

    Raises:
      DataError: the source is missing, unreadable, not of the expected format, or contains no text.
    """
    is_empty = True
    for document in assign_splits(read_units(list_work_units(config), config, stats), config.validation_fraction):
        is_empty = False
        yield document
    if is_empty:
        raise no_text_error(config, stats)


def no_text_error(config: CorpusConfig, stats: ReadStats) -> DataError:
    """Return the error for a corpus without any usable document."""
    counts = ", ".join(f"{count} left out: {reason}" for reason, count in sorted(stats.left_out.items()))
    detail = counts or "no documents at all"
    content = "text" if config.inputs_field is None else "inputs and targets"
    return DataError(f"corpus {config.name}: found no document with {content} ({detail}), expected at least one")


def list_work_units(config: CorpusConfig) -> list[WorkUnit]:
    """Return the work units of a corpus, in the order of its documents.

    Raises:
      DataError: the source is missing, or not of the expected format as far as this is visible without reading it.
    """
    # The readers are imported on use: pyarrow and TensorFlow are heavy, and most corpora need neither.
    if config.files:
        from t5x_like.data.sources import text_files

        units = text_files.list_work_units(config)
        if config.max_documents is None:
            return units
        by_split = itertools.groupby(units, lambda unit: unit.split)
        return [unit for _, part in by_split for unit in _limit(list(part), config, config.max_documents)]
    if config.generator:
        from t5x_like.data.sources import generators

        splits = source_splits(generators.available_splits(config), config)
        return [generators.generated_unit(config, source, split) for split, source in splits.items()]
    if config.tfds or config.task:
        from t5x_like.data.sources import tfds_and_seqio

        return tfds_and_seqio.list_work_units(config)
    from t5x_like.data.sources import python_docs

    return units_of_texts(python_docs.read(config.packages)[: config.max_documents])


def _limit(units: Sequence[WorkUnit], config: CorpusConfig, count: int) -> Iterator[WorkUnit]:
    """Yield the units that hold the first `count` documents; the last unit is limited to the remaining documents."""
    for unit in units:
        num_read = sum(1 for _ in itertools.islice(_open_unit(unit, config, ReadStats(), None), count))
        yield unit if num_read < count else dataclasses.replace(unit, limit=count)
        count -= num_read
        if not count:
            return


def read_units(
    units: Iterable[WorkUnit], config: CorpusConfig, stats: ReadStats, tokenizer: Tokenizer | None = None
) -> Iterator[Document]:
    """Yield the non-empty documents of several units; see `read_unit`."""
    return itertools.chain.from_iterable(read_unit(unit, config, stats, tokenizer) for unit in units)


def read_unit(
    unit: WorkUnit, config: CorpusConfig, stats: ReadStats, tokenizer: Tokenizer | None = None
) -> Iterator[Document]:
    """Yield the non-empty documents of a unit and count the empty ones.

    Args:
      unit: One of `list_work_units(config)`.
      config: Configuration of the corpus.
      stats: Updated while the unit is read.
      tokenizer: Tokenizer of the store. Documents whose source supplies ids of this tokenizer keep these ids. None
        reads text only.
    """
    for document in itertools.islice(_open_unit(unit, config, stats, tokenizer), unit.limit):
        if document.is_blank:
            stats.left_out["empty"] += 1
            continue
        if unit.kind == "task" and document.has_text:  # The other readers know the location.
            validate_target(document.text, document.inputs, config, lambda: f"corpus {config.name}")
        yield document if unit.split is None else document._replace(split=unit.split)


def _open_unit(
    unit: WorkUnit, config: CorpusConfig, stats: ReadStats, tokenizer: Tokenizer | None
) -> Iterator[Document]:
    match unit.kind:
        case "files":
            from t5x_like.data.sources import text_files

            return text_files.read_unit(unit, config, stats)
        case "texts":
            return (Document(text) for text in unit.texts)
        case "generator":
            from t5x_like.data.sources import generators

            return generators.read_unit(unit, config, stats)
        case "tfds" | "task":
            from t5x_like.data.sources import tfds_and_seqio

            return tfds_and_seqio.read_unit(unit, config, stats, tokenizer)
        case _:
            assert_never(unit.kind)
