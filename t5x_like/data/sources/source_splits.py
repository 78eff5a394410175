"""Splits of a source that has its own: which of them are read, and as which split of the store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from t5x_like.config.corpus import CorpusConfig
from t5x_like.errors import DataError


def source_splits(available: Sequence[str], config: CorpusConfig) -> dict[str | None, str]:
    """Return the splits to read, by the split of their documents; None if a fraction of the training split is held out.

    Args:
      available: Names of the splits of the source.
      config: Configuration of the corpus.

    Raises:
      DataError: a split that the configuration names does not exist.
    """
    validation = config.validation_split or ("validation" if "validation" in available else None)
    wanted = {"train" if validation else None: config.train_split, "validation": validation, "test": config.test_split}
    splits = {split: source for split, source in wanted.items() if source is not None}
    for source in splits.values():
        if source not in available:
            raise missing_split(config, available, source)
    return splits


def missing_split(config: CorpusConfig, available: Iterable[str], name: str) -> DataError:
    """Return the error of a source without a split."""
    names = ", ".join(sorted(available)) or "none"
    return DataError(f"corpus {config.name}: found the splits {names}, expected {name!r}")
