"""Registry of corpora that a plug-in generates: a user's own Python function that yields documents."""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from t5x_like.config.corpus import CorpusConfig
from t5x_like.data.sources.document import Document, ReadStats
from t5x_like.data.sources.row_fields import Row, RowReader
from t5x_like.data.sources.work_units import WorkUnit
from t5x_like.errors import ConfigError, DataError, UserError
from t5x_like.utils.name_registry import Registry

Documents = Iterable[str | Mapping[str, Any]]


class GeneratedCorpus(NamedTuple):
    """A registered corpus.

    Attributes:
      generate: Returns the documents of a split, always the same in the same order: texts, or rows with fields.
      splits: Names of its splits.
    """

    generate: Callable[[str], Documents]
    splits: tuple[str, ...]


CORPORA: Registry[GeneratedCorpus] = Registry("corpus")


def register_corpus(
    name: str, splits: Sequence[str] = ("train",)
) -> Callable[[Callable[[str], Documents]], Callable[[str], Documents]]:
    """Return a decorator that registers a function as the corpus `name`, for `CorpusConfig.generator`.

    Args:
      name: Name in the configuration.
      splits: Splits that the function yields documents of. It is called with the name of a split. If there is no
        "validation", a fraction of "train" is held out.
    """

    def register(generate: Callable[[str], Documents]) -> Callable[[str], Documents]:
        CORPORA.register(name, GeneratedCorpus(generate, tuple(splits)), defined_by=generate)
        return generate

    return register


def _corpus(config: CorpusConfig) -> GeneratedCorpus:
    assert config.generator is not None
    try:
        return CORPORA.lookup(config.generator, "data.corpus.generator")
    except ConfigError as error:
        raise DataError(str(error)) from None


def available_splits(config: CorpusConfig) -> tuple[str, ...]:
    """Return the splits of the corpus that the configuration names."""
    return _corpus(config).splits


def generated_unit(config: CorpusConfig, source_split: str, split: str | None) -> WorkUnit:
    """Return a split of a registered corpus as one work unit, which this process reads: other processes do not have the
    plug-in. Its size is unknown."""
    return WorkUnit("generator", 0, ((source_split,),), limit=config.max_documents, split=split)


def code_digest(config: CorpusConfig) -> str:
    """Return a digest of the file that registers the corpus, since changed code generates other documents."""
    module = sys.modules.get(_corpus(config).generate.__module__)
    path = getattr(module, "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def read_unit(unit: WorkUnit, config: CorpusConfig, stats: ReadStats) -> Iterator[Document]:
    """Yield the documents of a unit.

    Raises:
      UserError: the function raised an exception.
      DataError: a document is neither a text nor a row with the configured fields.
    """
    reader = RowReader(config)
    (split,) = unit.pieces[0]
    numbers = itertools.count(1)
    try:
        documents = iter(_corpus(config).generate(str(split)))
        for number, value in zip(numbers, documents, strict=False):
            if not isinstance(value, str | Mapping):
                raise DataError(
                    f"corpus {config.generator}, document {number}: found {type(value).__name__}, expected a text or a "
                    "mapping of fields"
                )
            if isinstance(value, str):
                value = {config.text_field: value}
            row = Row(value, lambda number=number: f"corpus {config.generator}, document {number}")  # type: ignore[misc]
            if (document := reader.document(row, stats)) is not None:
                yield document
    except UserError:
        raise
    except Exception as error:
        count = next(numbers) - 2
        raise UserError(
            f"the corpus {config.generator!r} raised {type(error).__name__} after {count} documents: {error}"
        ) from error
