"""Text of registered seqio Tasks and Mixtures and of TensorFlow Datasets. Imports TensorFlow, so only `prepare` imports
this, and only for a corpus that names one of them."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from t5x_like.config.corpora import CorpusConfig
from t5x_like.config.errors import DataError

Examples = Callable[[str], Iterator[Mapping[str, Any]]]

_SPLITS = ("train", "validation")


def read(config: CorpusConfig) -> Iterator[tuple[str, str | None]]:
    """(text, split) of every example; the split is None where the source has no validation split.

    Raises:
      DataError: no such source, or its examples hold no text where it is looked for.
    """
    if config.module:
        try:
            importlib.import_module(config.module)
        except ImportError as error:
            raise DataError(
                f"data.corpus.module: found {config.module!r}, which cannot be imported ({error})"
            ) from None
    # Text is read on the host; the accelerator belongs to the trainer.
    tf.config.set_visible_devices([], "GPU")
    splits, examples, to_text = _tfds(config) if config.tfds else _task(config)
    if "train" not in splits:
        raise DataError(
            f"corpus {config.name}: found the splits {', '.join(sorted(splits)) or 'none'}, expected 'train'"
        )
    own = "validation" in splits
    for split in _SPLITS if own else _SPLITS[:1]:
        for example in itertools.islice(examples(split), config.max_documents):
            yield to_text(example), split if own else None


def _tfds(config: CorpusConfig) -> tuple[set[str], Examples, Callable[[Mapping[str, Any]], str]]:
    try:
        builder = tfds.builder(config.tfds)
        if not builder.info.splits:
            builder.download_and_prepare()
    except (tfds.core.DatasetNotFoundError, AssertionError, OSError, ValueError) as error:
        expected = "a TensorFlow Datasets name that is prepared here or can be downloaded"
        raise DataError(f"data.corpus.tfds: found {config.tfds!r} ({error}), expected {expected}") from None
    if config.text_field not in builder.info.features:
        raise _missing(config, list(builder.info.features))

    def examples(split: str) -> Iterator[Mapping[str, Any]]:
        if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
            return iter(builder.as_data_source(split=split))
        return iter(tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False)))

    return set(builder.info.splits), examples, lambda example: _decoded(example[config.text_field], config)


def _task(config: CorpusConfig) -> tuple[set[str], Examples, Callable[[Mapping[str, Any]], str]]:
    assert config.task is not None
    try:
        provider = seqio.get_mixture_or_task(config.task)
    except ValueError as error:
        fix = "name the module that registers it by --data.corpus.module"
        raise DataError(
            f"data.corpus.task: found {config.task!r} ({error}), expected a registered one; {fix}"
        ) from None

    def examples(split: str) -> Iterator[Mapping[str, Any]]:
        # One pass, in the source's order; no lengths, so that nothing is trimmed.
        try:
            dataset = provider.get_dataset(
                sequence_length=None, split=split, use_cached=False, shuffle=False, seed=0, num_epochs=1
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"data.corpus.task: {config.task!r} cannot be read without sequence lengths ({error}); expected one "
                "that yields whole texts: cutting and corrupting them comes after"
            ) from error
        return dataset.as_numpy_iterator()

    def to_text(example: Mapping[str, Any]) -> str:
        """The text before tokenisation where the Task keeps it, or else its `targets` decoded by its vocabulary."""
        for name in ("targets_pretokenized", config.text_field, "targets"):
            if isinstance(example.get(name), bytes):
                return _decoded(example[name], config)
        if "targets" in example:
            vocabulary = provider.output_features["targets"].vocabulary
            return vocabulary.decode([int(token) for token in example["targets"].ravel()])
        raise _missing(config, list(example))

    return set(provider.splits), examples, to_text


def _decoded(value: Any, config: CorpusConfig) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise DataError(f"corpus {config.name}: found invalid UTF-8 ({error}), expected UTF-8 text") from None


def _missing(config: CorpusConfig, found: list[str]) -> DataError:
    names = ", ".join(map(repr, sorted(found))) or "none"
    expected = repr(config.text_field) if config.tfds else f"'targets' or {config.text_field!r}"
    return DataError(f"corpus {config.name}: found the features {names}, expected {expected}")
