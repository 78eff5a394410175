"""Documents of TensorFlow Datasets and of registered seqio Tasks and Mixtures.

This module imports TensorFlow. Only `prepare` imports it, and only for a corpus that names such a source.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from t5x_like import plugins
from t5x_like.config.corpus import CorpusConfig
from t5x_like.config.tokenizer import TokenizerConfig
from t5x_like.data.sources.document import Document, ReadStats
from t5x_like.data.sources.row_fields import Row, RowReader
from t5x_like.data.sources.source_splits import source_splits
from t5x_like.data.sources.work_units import FileRange, WorkUnit, split_range, unit_bytes, units_of_ranges
from t5x_like.data.tokenizers.bytes import ByteTokenizer
from t5x_like.data.tokenizers.sentencepiece import SentencePieceTokenizer
from t5x_like.data.tokenizers.tokenizer import Tokenizer, have_same_pieces
from t5x_like.data.tokenizers.vocabulary import EOS_ID, PAD_ID
from t5x_like.errors import ConfigError, ConfigProblem, DataError


def list_work_units(config: CorpusConfig) -> list[WorkUnit]:
    """Return the corpus as work units.

    A TFDS data set is divided into ranges of examples, and a Task into the shards of its source. A Mixture consists of
    the shards of all its Tasks, each of which is read once whatever its rate.

    Raises:
      DataError: the source does not exist.
    """
    _prepare_to_read(config)
    return _tfds_units(config) if config.tfds else _task_units(config)


def read_unit(
    unit: WorkUnit, config: CorpusConfig, stats: ReadStats, tokenizer: Tokenizer | None
) -> Iterator[Document]:
    """Yield the documents of a unit. Their split is None if the source has no validation split.

    Raises:
      DataError: an example lacks a configured feature, or its ids do not belong to the tokenizer's vocabulary.
    """
    _prepare_to_read(config)
    for piece in unit.pieces:
        if config.tfds:
            yield from _tfds_documents(piece, config, stats)
        else:
            yield from _task_documents(piece, config, stats, tokenizer)


def code_digest(config: CorpusConfig) -> str:
    """Return a digest of the module that registers the Task, since a changed module produces other documents."""
    module = sys.modules.get(config.module or "")
    path = getattr(module, "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def mixture_note(config: CorpusConfig) -> str | None:
    """Return a note to the user if the corpus is a Mixture of several Tasks, whose rates are not used."""
    tasks = _tasks(config) if config.task else []
    if len(tasks) < 2:
        return None
    return (
        f"{config.task}: each Task of the Mixture is read once, whatever its rate; to set rates, list the Tasks in "
        "data.corpora"
    )


def _prepare_to_read(config: CorpusConfig) -> None:
    if config.module:
        try:
            plugins.import_named_module(config.module, "data.corpus.module")
        except ImportError as error:
            raise DataError(
                f"data.corpus.module: found {config.module!r}, which cannot be imported ({error})"
            ) from None
    # TensorFlow must not reserve the accelerator, which the trainer uses. Text is read on the host.
    tf.config.set_visible_devices([], "GPU")


# TensorFlow Datasets.


def _builder(config: CorpusConfig) -> Any:
    try:
        builder = tfds.builder(config.tfds)
        if not builder.info.splits:
            builder.download_and_prepare()
    except (tfds.core.DatasetNotFoundError, AssertionError, OSError, ValueError) as error:
        expected = "the name of a TensorFlow data set that is prepared on this machine or can be downloaded"
        raise DataError(f"data.corpus.tfds: found {config.tfds!r} ({error}), expected {expected}") from None
    return builder


def _tfds_units(config: CorpusConfig) -> list[WorkUnit]:
    info = _builder(config).info
    for path in (path for reader in RowReader(config).fields for path in reader.paths):
        if path not in info.features and path.partition(".")[0] not in info.features:
            raise _missing_feature(config, list(info.features), path)
    splits = {name: info.splits[source] for name, source in source_splits(list(info.splits), config).items()}
    total = sum(split.num_bytes for split in splits.values())
    units: list[WorkUnit] = []
    for name, split in splits.items():
        ranges: list[tuple[FileRange, int]] = []
        count = min(split.num_examples, config.max_documents or split.num_examples)
        bytes_per_example = max(split.num_bytes // max(split.num_examples, 1), 1)
        for start, stop in split_range(count, max(unit_bytes(total) // bytes_per_example, 1)):
            ranges.append(((split.name, start, stop), (stop - start) * bytes_per_example))
        units += units_of_ranges("tfds", ranges, total, name)
    return units


def _tfds_documents(piece: FileRange, config: CorpusConfig, stats: ReadStats) -> Iterator[Document]:
    split, start, stop = piece
    builder = _builder(config)
    split_info = builder.info.splits[split]
    bytes_per_example = split_info.num_bytes // max(split_info.num_examples, 1)
    part = f"{split}[{start}:{stop}]"
    if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        examples = iter(builder.as_data_source(split=part))
    else:
        # Files are not interleaved: the order of the documents must not depend on the start of a unit.
        options = tfds.ReadConfig(interleave_cycle_length=1)
        dataset = builder.as_dataset(split=part, shuffle_files=False, read_config=options)
        examples = iter(tfds.as_numpy(dataset))
    reader = RowReader(config)
    for number, example in enumerate(examples, start=int(start)):
        stats.position += bytes_per_example
        where = functools.partial(_example_location, config.name, str(split), number)
        if (document := reader.document(Row(example, where), stats)) is not None:
            yield document


def _example_location(corpus: str, split: str, number: int) -> str:
    return f"corpus {corpus}, example {number} of {split}"


# Tasks and Mixtures.


def _tasks(config: CorpusConfig) -> list[Any]:
    """Return the Task, or all Tasks of the Mixture."""
    assert config.task is not None
    try:
        provider = seqio.get_mixture_or_task(config.task)
    except ValueError as error:
        fix = "name the module that registers it by --data.corpus.module"
        raise DataError(
            f"data.corpus.task: found {config.task!r} ({error}), expected a registered Task or Mixture; {fix}"
        ) from None
    return list(provider.tasks) if isinstance(provider, seqio.Mixture) else [provider]


def _task_units(config: CorpusConfig) -> list[WorkUnit]:
    units = []
    for task in _tasks(config):
        for split, source in source_splits(list(task.splits), config).items():
            shards = list(task.source.list_shards(source)) or [source]
            size = sum(map(_file_size, shards))
            if config.max_documents is not None:
                shards = shards[:1]
            # One unit per file at most: if a source has fewer files than shards, every shard reads all files.
            for shard in range(len(shards)):
                piece = (task.name, source, shard, len(shards))
                units.append(WorkUnit("task", size // len(shards), (piece,), limit=config.max_documents, split=split))
    return units


def _file_size(shard: str) -> int:
    """Return the size of a shard in bytes; 0 if the name of the shard is not a file name."""
    try:
        return int(tf.io.gfile.stat(shard).length)
    except (tf.errors.OpError, ValueError, TypeError):
        return 0


def _task_documents(
    piece: FileRange, config: CorpusConfig, stats: ReadStats, tokenizer: Tokenizer | None
) -> Iterator[Document]:
    name, split, shard, shards = piece
    task = seqio.get_mixture_or_task(name)
    extractor = _document_extractor(str(name), config, tokenizer)
    for example in _examples(task, str(split), int(shard), int(shards)):
        stats.position += sum(value.nbytes for value in example.values() if isinstance(value, np.ndarray))
        yield extractor.document(example)


def _examples(task: Any, split: str, shard: int, shards: int) -> Iterator[Mapping[str, Any]]:
    # One pass in the order of the source. Without sequence lengths, seqio trims nothing.
    try:
        dataset = task.get_dataset(
            sequence_length=None,
            split=split,
            use_cached=False,
            shuffle=False,
            seed=0,
            num_epochs=1,
            shard_info=seqio.ShardInfo(index=shard, num_shards=shards) if shards > 1 else None,
            try_in_mem_cache=False,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"data.corpus.task: {task.name!r} cannot be read without sequence lengths ({error}); expected a "
            "Task that yields complete texts, since texts are cut and corrupted later"
        ) from error
    examples: Iterator[Mapping[str, Any]] = dataset.as_numpy_iterator()
    return examples


@functools.lru_cache(maxsize=16)
def _document_extractor(task: str, config: CorpusConfig, tokenizer: Tokenizer | None) -> _DocumentExtractor:
    return _DocumentExtractor(seqio.get_mixture_or_task(task), config, tokenizer)


class _DocumentExtractor:
    """Extraction of documents from the examples of a Task.

    Token ids are taken if the Task's vocabulary is that of the store's tokenizer; otherwise the text is taken.
    """

    def __init__(self, task: Any, config: CorpusConfig, tokenizer: Tokenizer | None):
        self._task, self._config, self._tokenizer = task, config, tokenizer
        features = ["targets"] if config.inputs_field is None else [config.inputs_field, "targets"]
        self._features = features
        self._has_store_ids = {name: self._is_store_vocabulary(name) for name in features}

    def _is_store_vocabulary(self, name: str) -> bool:
        feature = self._task.output_features.get(name)
        if self._tokenizer is None or feature is None or not np.issubdtype(_numpy_dtype(feature), np.integer):
            return False
        task_tokenizer = tokenizer_of(feature.vocabulary)
        return task_tokenizer is not None and have_same_pieces(self._tokenizer, task_tokenizer)

    def document(self, example: Mapping[str, Any]) -> Document:
        key = None
        if self._config.key_field is not None:
            if self._config.key_field not in example:
                raise _missing_feature(self._config, list(example), self._config.key_field)
            key = _decode(example[self._config.key_field], self._config)
        if all(self._has_store_ids[name] and _holds_ids(example.get(name)) for name in self._features):
            tokens = tuple(self._ids(example[name], name) for name in self._features)
            originals = [example.get(f"{name}_pretokenized") for name in self._features]
            has_originals = all(isinstance(text, bytes) for text in originals)
            texts = [_decode(text, self._config) for text in originals] if has_originals else [""] * len(originals)
            return Document(texts[-1], None, texts[0] if len(texts) == 2 else None, tokens, key=key)
        texts = [self._text(example, name) for name in self._features]
        return Document(texts[-1], None, texts[0] if len(texts) == 2 else None, key=key)

    def _text(self, example: Mapping[str, Any], name: str) -> str:
        """Return the text before tokenisation, which a Task can keep in `<feature>_pretokenized`."""
        keys = (f"{name}_pretokenized", name, *((self._config.text_field,) if name == "targets" else ()))
        for key in keys:
            if isinstance(example.get(key), bytes):
                return _decode(example[key], self._config)
        if name not in example:
            raise _missing_feature(self._config, list(example), name)
        raise DataError(
            f"data.corpus.task: found ids of another vocabulary than the run's in the feature {name!r} of "
            f"{self._task.name!r}, without the original text; expected ids of the run's vocabulary or text. Use the "
            "Task's own vocabulary (--data.tokenizer.kind task) or let its `tokenize` keep the text "
            "(copy_pretokenized=True)"
        )

    def _ids(self, value: Any, name: str) -> npt.NDArray[Any]:
        """Return the ids of a feature without EOS and trailing padding.

        Raises:
          DataError: there is padding before the end, which every reader would treat as the end, or an id is outside
            the vocabulary.
        """
        assert self._tokenizer is not None
        ids: npt.NDArray[Any] = np.trim_zeros(np.asarray(value).ravel(), "b")
        if len(ids) and ids[-1] == EOS_ID:
            ids = ids[:-1]
        where = f"data.corpus.task: found {{}} inside the feature {name!r} of {self._task.name!r}, expected {{}}"
        if (ids == PAD_ID).any():
            raise DataError(where.format("the id 0", "padding at the end only, since padding ends an example"))
        vocabulary = self._tokenizer.vocabulary
        same_sentinels = self._task.output_features[name].vocabulary.extra_ids == vocabulary.num_sentinels
        bound = vocabulary.base_size + (vocabulary.num_sentinels if same_sentinels else 0)
        if len(ids) and (ids.max() >= bound or ids.min() < 0):
            raise DataError(where.format(f"the id {ids.max()}", f"ids below {bound}, the size of the run's vocabulary"))
        return ids


def _numpy_dtype(feature: Any) -> Any:
    return tf.as_dtype(feature.dtype).as_numpy_dtype


def _holds_ids(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic) and np.issubdtype(value.dtype, np.integer)


# A Task's own vocabulary.


def task_tokenizer(corpora: Sequence[CorpusConfig], config: TokenizerConfig) -> Tokenizer:
    """Return the tokenizer with the vocabulary of the Tasks among `corpora`.

    Raises:
      DataError: there is no Task, a Task's vocabulary has no equivalent tokenizer, or the Tasks' vocabularies differ.
      ConfigError: more sentinels are requested than the vocabulary has.
    """
    by_task: dict[str, Tokenizer] = {}
    for corpus in corpora:
        if corpus.task:
            _prepare_to_read(corpus)
            for task in _tasks(corpus):
                feature = task.output_features.get("targets")
                if feature is None:
                    raise _missing_feature(corpus, list(task.output_features), "targets")
                by_task[task.name] = _required_tokenizer(task.name, feature.vocabulary, config.num_sentinels)
    if not by_task:
        raise DataError("data.tokenizer.kind: found 'task' without a corpus that is a seqio Task, expected one")
    if len({tokenizer.fingerprint for tokenizer in by_task.values()}) > 1:
        sizes = ", ".join(f"{name!r} of {tokenizer.vocab_size:,} ids" for name, tokenizer in by_task.items())
        raise DataError(f"data.tokenizer.kind: found Tasks whose vocabularies differ ({sizes}), expected one for all")
    return next(iter(by_task.values()))


def _required_tokenizer(name: str, vocabulary: Any, num_sentinels: int) -> Tokenizer:
    tokenizer = tokenizer_of(vocabulary, num_sentinels)
    if tokenizer is None:
        raise DataError(
            f"data.tokenizer.kind: found the Task {name!r} with {type(vocabulary).__name__} {vocabulary}, expected "
            "seqio's SentencePieceVocabulary with pad 0, eos 1 and unk 2, or its ByteVocabulary; "
            "set --data.tokenizer.path to a model with which the Task's text is tokenised again"
        )
    available = tokenizer.vocabulary.num_sentinels
    if num_sentinels > available:
        expected = f"at most the {available} extra ids of the Task's vocabulary"
        raise ConfigError([ConfigProblem("data.tokenizer.num_sentinels", str(num_sentinels), expected)])
    return tokenizer


def tokenizer_of(vocabulary: Any, num_sentinels: int = 0) -> Tokenizer | None:
    """Return the tokenizer that produces the ids of a seqio vocabulary; None if there is no such tokenizer.

    Args:
      vocabulary: A seqio vocabulary.
      num_sentinels: Number of sentinels to add if the vocabulary has no extra ids.
    """
    number = vocabulary.extra_ids or num_sentinels
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return ByteTokenizer(number)
    if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return None
    path = vocabulary.sentencepiece_model_file
    with tf.io.gfile.GFile(path, "rb") as file:
        tokenizer = SentencePieceTokenizer(file.read(), number, path)
    standard = (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
    return tokenizer if standard and tokenizer.ids_are_the_models else None


def _decode(value: Any, config: CorpusConfig) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise DataError(f"corpus {config.name}: found invalid UTF-8 ({error}), expected UTF-8 text") from None


def _missing_feature(config: CorpusConfig, available: list[str], field: str) -> DataError:
    names = ", ".join(map(repr, sorted(available))) or "none"
    alternative = f" or {config.text_field!r}" if config.task and field == "targets" else ""
    return DataError(f"corpus {config.name}: found the features {names}, expected {field!r}{alternative}")
