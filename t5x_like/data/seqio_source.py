"""Documents of registered seqio Tasks and Mixtures and of TensorFlow Datasets. Imports TensorFlow, so only `prepare`
imports this, and only for a corpus that names one of them."""

from __future__ import annotations

import functools
import hashlib
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from t5x_like.config.corpora import CorpusConfig, TokenizerConfig
from t5x_like.config.errors import ConfigError, DataError, Problem
from t5x_like.data import tokenizers
from t5x_like.data import units as units_
from t5x_like.data.documents import Document, Reading
from t5x_like.data.tokenizers import SentencePieceTokenizer, Tokenizer
from t5x_like.data.units import Piece, Unit
from t5x_like.data.vocabulary import EOS_ID, PAD_ID

_SPLITS = ("train", "validation")


def units(config: CorpusConfig) -> list[Unit]:
    """The corpus as units of work: of a TFDS data set, ranges of examples; of a Task, the shards of its source; of a
    Mixture, those of all its Tasks, each of which is read once whatever its rate.

    Raises:
      DataError: no such source.
    """
    _prepare_to_read(config)
    return _tfds_units(config) if config.tfds else _task_units(config)


def read(unit: Unit, config: CorpusConfig, reading: Reading, tokenizer: Tokenizer | None) -> Iterator[Document]:
    """The documents of a unit. Their split is None where the source has no validation split.

    Raises:
      DataError: the examples hold nothing where it is looked for, or ids that mean nothing to the tokenizer.
    """
    _prepare_to_read(config)
    for piece in unit.pieces:
        yield from (
            _tfds_documents(piece, config, reading)
            if config.tfds
            else _task_documents(piece, config, reading, tokenizer)
        )


def code_digest(config: CorpusConfig) -> str:
    """Of the module that registers the Task: another one makes other documents."""
    module = sys.modules.get(config.module or "")
    path = getattr(module, "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def note(config: CorpusConfig) -> str | None:
    """What a user should know before the corpus is read."""
    tasks = _tasks(config) if config.task else []
    if len(tasks) < 2:
        return None
    return (
        f"{config.task}: each Task of the Mixture is read once, whatever its rate; for rates, name them in data.corpora"
    )


def _prepare_to_read(config: CorpusConfig) -> None:
    if config.module:
        try:
            importlib.import_module(config.module)
        except ImportError as error:
            raise DataError(
                f"data.corpus.module: found {config.module!r}, which cannot be imported ({error})"
            ) from None
    # Text is read on the host; the accelerator belongs to the trainer.
    tf.config.set_visible_devices([], "GPU")


def _splits_of(found: Sequence[str], config: CorpusConfig) -> list[str]:
    """Those that are read: the training split, and the validation split if there is one."""
    if "train" not in found:
        names = ", ".join(sorted(found)) or "none"
        raise DataError(f"corpus {config.name}: found the splits {names}, expected 'train'")
    return [split for split in _SPLITS if split in found]


# TensorFlow Datasets.


def _builder(config: CorpusConfig) -> Any:
    try:
        builder = tfds.builder(config.tfds)
        if not builder.info.splits:
            builder.download_and_prepare()
    except (tfds.core.DatasetNotFoundError, AssertionError, OSError, ValueError) as error:
        expected = "a TensorFlow Datasets name that is prepared here or can be downloaded"
        raise DataError(f"data.corpus.tfds: found {config.tfds!r} ({error}), expected {expected}") from None
    return builder


def _tfds_units(config: CorpusConfig) -> list[Unit]:
    info = _builder(config).info
    for field in (config.text_field, config.inputs_field):
        if field is not None and field not in info.features:
            raise _missing(config, list(info.features), field)
    splits = [info.splits[name] for name in _splits_of(list(info.splits), config)]
    total = sum(split.num_bytes for split in splits)
    pieces: list[tuple[Piece, int]] = []
    for split in splits:
        count = min(split.num_examples, config.max_documents or split.num_examples)
        each = max(split.num_bytes // max(split.num_examples, 1), 1)
        for start, stop in units_.ranges(count, max(units_.unit_bytes(total) // each, 1)):
            pieces.append(((split.name, start, stop), (stop - start) * each))
    return units_.of_pieces("tfds", pieces, total)


def _tfds_documents(piece: Piece, config: CorpusConfig, reading: Reading) -> Iterator[Document]:
    split, start, stop = piece
    builder = _builder(config)
    each = builder.info.splits[split].num_bytes // max(builder.info.splits[split].num_examples, 1)
    part = f"{split}[{start}:{stop}]"
    if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        examples = iter(builder.as_data_source(split=part))
    else:
        # One file after the other: the order must not depend on where a unit begins.
        options = tfds.ReadConfig(interleave_cycle_length=1)
        dataset = builder.as_dataset(split=part, shuffle_files=False, read_config=options)
        examples = iter(tfds.as_numpy(dataset))
    own = str(split) if "validation" in builder.info.splits else None
    for example in examples:
        reading.position += each
        inputs = None if config.inputs_field is None else _decoded(example[config.inputs_field], config)
        yield Document(_decoded(example[config.text_field], config), own, inputs)


# Tasks and Mixtures.


def _tasks(config: CorpusConfig) -> list[Any]:
    """The Task, or all Tasks of the Mixture."""
    assert config.task is not None
    try:
        provider = seqio.get_mixture_or_task(config.task)
    except ValueError as error:
        fix = "name the module that registers it by --data.corpus.module"
        raise DataError(
            f"data.corpus.task: found {config.task!r} ({error}), expected a registered one; {fix}"
        ) from None
    return list(provider.tasks) if isinstance(provider, seqio.Mixture) else [provider]


def _task_units(config: CorpusConfig) -> list[Unit]:
    found = []
    for task in _tasks(config):
        for split in _splits_of(list(task.splits), config):
            shards = list(task.source.list_shards(split)) or [split]
            size = sum(map(_file_size, shards))
            if config.max_documents is not None:
                shards = shards[:1]
            # No more parts than files: of a source with fewer files than parts, each part reads all of them.
            for shard in range(len(shards)):
                piece = (task.name, split, shard, len(shards))
                found.append(Unit("task", size // len(shards), (piece,), limit=config.max_documents))
    return found


def _file_size(shard: str) -> int:
    """Of a shard that is a file; a source may name its shards otherwise."""
    try:
        return int(tf.io.gfile.stat(shard).length)
    except (tf.errors.OpError, ValueError, TypeError):
        return 0


def _task_documents(
    piece: Piece, config: CorpusConfig, reading: Reading, tokenizer: Tokenizer | None
) -> Iterator[Document]:
    name, split, shard, shards = piece
    task = seqio.get_mixture_or_task(name)
    takes = _taking(str(name), config, tokenizer)
    own = str(split) if "validation" in task.splits else None
    for example in _examples(task, str(split), int(shard), int(shards)):
        reading.position += sum(value.nbytes for value in example.values() if isinstance(value, np.ndarray))
        yield takes.document(example, own)


def _examples(task: Any, split: str, shard: int, shards: int) -> Iterator[Mapping[str, Any]]:
    # One pass, in the source's order; no lengths, so that nothing is trimmed.
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
            f"data.corpus.task: {task.name!r} cannot be read without sequence lengths ({error}); expected one "
            "that yields whole texts: cutting and corrupting them comes after"
        ) from error
    examples: Iterator[Mapping[str, Any]] = dataset.as_numpy_iterator()
    return examples


@functools.lru_cache(maxsize=16)
def _taking(task: str, config: CorpusConfig, tokenizer: Tokenizer | None) -> _Taking:
    return _Taking(seqio.get_mixture_or_task(task), config, tokenizer)


class _Taking:
    """How documents are taken from a Task's examples: by ids where these are the store's own, or else by text."""

    def __init__(self, task: Any, config: CorpusConfig, tokenizer: Tokenizer | None):
        self._task, self._config, self._tokenizer = task, config, tokenizer
        features = ["targets"] if config.inputs_field is None else [config.inputs_field, "targets"]
        self._features = features
        self._ids_are_ours = {name: self._has_our_ids(name) for name in features}

    def _has_our_ids(self, name: str) -> bool:
        feature = self._task.output_features.get(name)
        if self._tokenizer is None or feature is None or not np.issubdtype(_numpy_dtype(feature), np.integer):
            return False
        own = tokenizer_of(feature.vocabulary)
        return own is not None and self._tokenizer.has_pieces_of(own)

    def document(self, example: Mapping[str, Any], split: str | None) -> Document:
        if all(self._ids_are_ours[name] and _holds_ids(example.get(name)) for name in self._features):
            tokens = tuple(self._ids(example[name], name) for name in self._features)
            kept = [example.get(f"{name}_pretokenized") for name in self._features]
            known = all(isinstance(text, bytes) for text in kept)
            texts = [_decoded(text, self._config) for text in kept] if known else [""] * len(kept)
            return Document(texts[-1], split, texts[0] if len(texts) == 2 else None, tokens)
        texts = [self._text(example, name) for name in self._features]
        return Document(texts[-1], split, texts[0] if len(texts) == 2 else None)

    def _text(self, example: Mapping[str, Any], name: str) -> str:
        """The text before tokenisation, where the Task keeps it."""
        places = (f"{name}_pretokenized", name, *((self._config.text_field,) if name == "targets" else ()))
        for place in places:
            if isinstance(example.get(place), bytes):
                return _decoded(example[place], self._config)
        if name not in example:
            raise _missing(self._config, list(example), name)
        raise DataError(
            f"data.corpus.task: found ids of another vocabulary than the run's in the feature {name!r} of "
            f"{self._task.name!r}, without the text that they were made from; expected either, so take the Task's own "
            "vocabulary (--data.tokenizer.kind task) or let its `tokenize` keep the text (copy_pretokenized=True)"
        )

    def _ids(self, value: Any, name: str) -> npt.NDArray[Any]:
        """The example's ids without EOS and padding behind them.

        Raises:
          DataError: padding inside, which every reader would take for the end, or an id that the store cannot hold.
        """
        assert self._tokenizer is not None
        ids: npt.NDArray[Any] = np.trim_zeros(np.asarray(value).ravel(), "b")
        if len(ids) and ids[-1] == EOS_ID:
            ids = ids[:-1]
        where = f"data.corpus.task: found {{}} inside the feature {name!r} of {self._task.name!r}, expected {{}}"
        if (ids == PAD_ID).any():
            raise DataError(where.format("the id 0", "padding at the end only: it would cut the example short"))
        vocabulary = self._tokenizer.vocabulary
        same_sentinels = self._task.output_features[name].vocabulary.extra_ids == vocabulary.num_sentinels
        bound = vocabulary.base_size + (vocabulary.num_sentinels if same_sentinels else 0)
        if len(ids) and (ids.max() >= bound or ids.min() < 0):
            raise DataError(where.format(f"the id {ids.max()}", f"ids below {bound}, those of the run's vocabulary"))
        return ids


def _numpy_dtype(feature: Any) -> Any:
    return tf.as_dtype(feature.dtype).as_numpy_dtype


def _holds_ids(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic) and np.issubdtype(value.dtype, np.integer)


# A Task's own vocabulary.


def task_tokenizer(corpora: Sequence[CorpusConfig], config: TokenizerConfig) -> Tokenizer:
    """The tokenizer whose ids are those of the Tasks among `corpora`.

    Raises:
      DataError: they have none, or one that has no tokenizer here, or differ in theirs.
      ConfigError: more sentinels are asked for than the vocabulary has.
    """
    found: dict[str, Tokenizer] = {}
    for corpus in corpora:
        if corpus.task:
            _prepare_to_read(corpus)
            for task in _tasks(corpus):
                feature = task.output_features.get("targets")
                if feature is None:
                    raise _missing(corpus, list(task.output_features), "targets")
                found[task.name] = _required_tokenizer(task.name, feature.vocabulary, config.num_sentinels)
    if not found:
        raise DataError("data.tokenizer.kind: found 'task' without a corpus that is a seqio Task, expected one")
    if len({tokenizer.fingerprint for tokenizer in found.values()}) > 1:
        sizes = ", ".join(f"{name!r} of {tokenizer.vocab_size:,} ids" for name, tokenizer in found.items())
        raise DataError(f"data.tokenizer.kind: found Tasks whose vocabularies differ ({sizes}), expected one for all")
    return next(iter(found.values()))


def _required_tokenizer(name: str, vocabulary: Any, num_sentinels: int) -> Tokenizer:
    tokenizer = tokenizer_of(vocabulary, num_sentinels)
    if tokenizer is None:
        raise DataError(
            f"data.tokenizer.kind: found the Task {name!r} with {type(vocabulary).__name__} {vocabulary}, expected "
            "seqio's SentencePieceVocabulary with pad 0, eos 1 and unk 2, or its ByteVocabulary; "
            "name a model by --data.tokenizer.path, with which the Task's text is tokenised again"
        )
    given = tokenizer.vocabulary.num_sentinels
    if num_sentinels > given:
        expected = f"at most the {given} extra ids of the Task's vocabulary"
        raise ConfigError([Problem("data.tokenizer.num_sentinels", str(num_sentinels), expected)])
    return tokenizer


def tokenizer_of(vocabulary: Any, num_sentinels: int = 0) -> Tokenizer | None:
    """Ours that gives the vocabulary's ids; None if there is none. `num_sentinels`: if the vocabulary has none."""
    number = vocabulary.extra_ids or num_sentinels
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return tokenizers.ByteTokenizer(number)
    if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return None
    path = vocabulary.sentencepiece_model_file
    with tf.io.gfile.GFile(path, "rb") as file:
        tokenizer = SentencePieceTokenizer(file.read(), number, path)
    standard = (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
    return tokenizer if standard and tokenizer.ids_are_the_models else None


def _decoded(value: Any, config: CorpusConfig) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise DataError(f"corpus {config.name}: found invalid UTF-8 ({error}), expected UTF-8 text") from None


def _missing(config: CorpusConfig, found: list[str], field: str) -> DataError:
    names = ", ".join(map(repr, sorted(found))) or "none"
    alternative = f" or {config.text_field!r}" if config.task and field == "targets" else ""
    return DataError(f"corpus {config.name}: found the features {names}, expected {field!r}{alternative}")
