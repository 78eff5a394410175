"""Batches of a registered seqio Task or Mixture, made by tf.data while the model trains. Imports TensorFlow.

The position of such a pipeline is an opaque file per host. tf.data restores it into almost any other pipeline without a
word (another seed, another number of hosts, other rates), so an account of everything that decides the batches lies
beside it, and a difference is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import io
import json
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from t5x_like.config.data import DataConfig
from t5x_like.config.errors import DataError, RefusedError
from t5x_like.config.objectives import Layout
from t5x_like.data.features import Features
from t5x_like.data.store import Store

_IDENTITY = "identity.json"
_PACKAGES = ("seqio", "tensorflow", "tensorflow-text", "tensorflow-datasets")


class LiveBatches(Iterator[dict[str, Features]]):
    """The batches of one host, in order, each {"main": features} of numpy arrays as in `config.batch.batch_spec`.

    Nothing is taken ahead of `__next__`: tf.data's own buffers belong to the state that `state_files` returns. It is a
    `data.batches.Source` too.

    Raises:
      DataError: no such Task or Mixture or split, or it lacks the features of the layout.
    """

    def __init__(
        self,
        data: DataConfig,
        batch_size: int,
        *,
        split: str = "train",
        host: int = 0,
        hosts: int = 1,
        keeps_state: bool = True,
    ):
        """
        Args:
          data: With `seqio`; its layout, lengths and seed count too.
          batch_size: Global rows of a batch; a multiple of `hosts`.
          split: Of the Task.
          host, hosts: Which share of the examples to read.
          keeps_state: Whether `state_files` has any; of several processes with the same share, one has.
        """
        assert data.seqio is not None
        if batch_size % hosts:
            raise DataError(f"training.batch_size: found {batch_size} rows for {hosts} hosts, expected a multiple")
        self.provider = load_provider(data.seqio.mixture_or_task, data.seqio.module)
        self.data = data
        self._host, self._hosts, self._keeps_state = host, hosts, keeps_state
        self._taken = 0
        lengths, converter = converter_for(data, self.provider)
        if split not in self.provider.splits:
            raise DataError(
                f"data.seqio: {self.provider.name!r} has the splits {', '.join(self.provider.splits)}, "
                f"expected {split!r} among them"
            )
        dataset = seqio.get_dataset(
            self.provider,
            lengths,
            converter,
            dataset_split=split,
            use_cached=data.seqio.use_cached,
            shuffle=data.seqio.shuffle,
            num_epochs=data.seqio.num_epochs,
            shard_info=seqio.ShardInfo(index=host, num_shards=hosts),
            verbose=False,
            seed=data.seed,
            batch_size=batch_size // hosts,
        )
        self._iterator = iter(dataset.prefetch(data.prefetch))
        self.identity = identity(self.provider, data, batch_size, split, hosts)
        """Everything that decides which batch is which, as JSON values."""
        self._is_saveable = False

    stores: tuple[Store, ...] = ()

    @property
    def origin(self) -> str:
        return f"the seqio Task or Mixture {self.provider.name!r}"

    @property
    def vocab_size(self) -> int:
        """The largest of its features' vocabularies, with the sentinels that they bring."""
        return max(int(feature.vocabulary.vocab_size) for feature in self.provider.output_features.values())

    def epochs(self, first_row: int) -> dict[str, float]:
        """Not known: Tasks do not say how many examples they have."""
        del first_row
        return {}

    def describe(self, first_row: int, rows: int, max_tokens: int) -> list[Any]:
        """Its Tasks; to show rows would be to take them."""
        del first_row, rows, max_tokens
        rates: dict[str, float] = self.identity["rates"]
        tasks = ", ".join(f"{name} ({rate / sum(rates.values()):.1%})" for name, rate in rates.items())
        return [f"live from seqio: {self.provider.name}, Tasks: {tasks}"]

    def start(self, first_row: int, meta: Mapping[str, str] | None, files: Mapping[str, bytes]) -> LiveBatches:
        """Itself, where it was saved."""
        del first_row
        if meta is not None:
            self.restore(files)
        return self

    @property
    def fingerprint(self) -> str:
        """Digest of `identity`."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:32]

    def __next__(self) -> dict[str, Features]:
        """Raises DataError where `num_epochs` are over, the position cannot be saved, or seqio's packing has paired the
        wrong examples."""
        features = self._take()
        if features is None:
            assert self.data.seqio is not None
            raise DataError(
                f"data.seqio: {self.provider.name!r} ended after {self._taken:,} batches, which are "
                f"{self.data.seqio.num_epochs} epochs; expected enough for training.num_train_steps. Set "
                "data.seqio.num_epochs to None for no end"
            )
        self._taken += 1
        if not self._is_saveable:
            self._require_saveable()
        return {"main": features}

    def rest(self) -> Iterator[Features]:
        """The features of what is left of `num_epochs`."""
        while (features := self._take()) is not None:
            yield features

    def _take(self) -> Features | None:
        try:
            tensors = next(self._iterator, None)
        except tf.errors.OpError as error:
            raise DataError(f"data.seqio: {self.provider.name!r} cannot be read ({error.message})") from error
        if tensors is None:
            return None
        features = {name: tensor.numpy().astype(np.int32) for name, tensor in tensors.items()}
        if self.data.layout == "causal_lm":
            features.pop("decoder_causal_attention", None)
        _require_paired(features, self.provider.name)
        return features

    def close(self) -> None:
        """Ends tf.data's threads of this iterator."""
        del self._iterator

    def state_files(self) -> dict[str, bytes]:
        """The position of this host, as files for the checkpoint: one archive per host."""
        if not self._keeps_state:
            return {}
        return {self._name(self._host, self._hosts): self._position()}

    def _position(self) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            tf.train.Checkpoint(iterator=self._iterator).write(f"{folder}/state")
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w") as archive:
                archive.writestr(_IDENTITY, json.dumps({**self.identity, "taken": self._taken}, indent=1))
                for path in sorted(Path(folder).glob("state.*")):
                    archive.write(path, path.name)
        return packed.getvalue()

    def restore(self, files: Mapping[str, bytes]) -> None:
        """Goes on where `state_files` was called.

        Args:
          files: Those of all hosts, by name.

        Raises:
          RefusedError: they are of other data, another number of hosts, or other versions; the differences are listed.
        """
        if not files:
            raise RefusedError(
                "the checkpoint has no position of a seqio pipeline: it was trained on a prepared store. Go on with "
                "that data, or begin anew in another --workdir."
            )
        mine = files.get(self._name(self._host, self._hosts), next(iter(files.values())))
        with zipfile.ZipFile(io.BytesIO(mine)) as archive, tempfile.TemporaryDirectory() as folder:
            saved = json.loads(archive.read(_IDENTITY))
            taken = saved.pop("taken")
            require_same_pipeline(saved, self.identity)
            archive.extractall(folder)
            tf.train.Checkpoint(iterator=self._iterator).read(f"{folder}/state").assert_consumed()
        self._taken = taken

    def _require_saveable(self) -> None:
        """A pipeline with state of its own is refused at its first batch, not at the first save."""
        try:
            self._position()
        except tf.errors.FailedPreconditionError as error:
            found = re.search(r"(\w+) is stateful", error.message)
            raise DataError(
                f"data.seqio: the position of {self.provider.name!r} cannot be saved: a preprocessor uses "
                f"{found[1] if found else error.message}, which keeps a state of its own; expected stateless "
                "operations: tf.random.stateless_*, and tf.numpy_function(..., stateful=False) for pure functions"
            ) from None
        self._is_saveable = True

    @staticmethod
    def _name(host: int, hosts: int) -> str:
        return f"seqio-{host:05d}-of-{hosts:05d}.zip"


def validation_batches(data: DataConfig, rows: int, num_batches: int) -> Iterator[dict[str, Features]]:
    """Global batches of the Task's validation split in its order, one example per row, the same on every host.

    They end with the split; the last one is filled up with rows of padding.
    """
    assert data.seqio is not None
    config = dataclasses.replace(data.seqio, pack=False, shuffle=False, num_epochs=1)
    if "validation" not in load_provider(config.mixture_or_task, config.module).splits:
        return
    examples = LiveBatches(dataclasses.replace(data, seqio=config), 1, split="validation")
    for _ in range(num_batches):
        found = [features for features, _ in zip(examples.rest(), range(rows), strict=False)]
        if not found:
            return
        yield {
            "main": {
                name: np.concatenate([row[name] for row in found] + [np.zeros_like(values)] * (rows - len(found)))
                for name, values in found[0].items()
            }
        }


def load_provider(name: str, module: str | None) -> Any:
    """A registered Task or Mixture, with the accelerators left to the trainer.

    Raises:
      DataError: the module cannot be imported or registers no such name.
    """
    tf.config.set_visible_devices([], "GPU")
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise DataError(f"data.seqio.module: found {module!r}, which cannot be imported ({error})") from None
    try:
        return seqio.get_mixture_or_task(name)
    except ValueError as error:
        fix = "name the module that registers it by --data.seqio.module"
        raise DataError(
            f"data.seqio.mixture_or_task: found {name!r} ({error}), expected a registered one; {fix}"
        ) from None


def converter_for(data: DataConfig, provider: Any) -> tuple[dict[str, int], Any]:
    """Task feature lengths and seqio's feature converter of a layout.

    Raises:
      DataError: the Task lacks a feature that the layout needs.
    """
    assert data.seqio is not None
    has = set(provider.output_features)
    plain = data.layout == "causal_lm" and "inputs" not in has
    needed = {"targets"} if plain else {"inputs", "targets"}
    if not needed <= has:
        raise DataError(
            f"data.seqio: {provider.name!r} has the features {', '.join(sorted(has))}, expected "
            f"{' and '.join(sorted(needed))} for the layout {data.layout}"
        )
    if plain:
        return {"targets": data.row_length}, seqio.LMFeatureConverter(pack=data.seqio.pack)
    if data.layout == "encoder":
        lengths = {"inputs": data.inputs_length, "targets": data.inputs_length}
        return lengths, seqio.EncoderFeatureConverter(mask_id=data.seqio.mask_id, pack=data.seqio.pack)
    converters: dict[Layout, Callable[..., Any]] = {
        "encoder_decoder": seqio.EncDecFeatureConverter,
        "prefix_lm": seqio.PrefixLMFeatureConverter,
        "causal_lm": seqio.PrefixLMFeatureConverter,  # The same row; attention to the inputs is causal too.
    }
    lengths = {"inputs": data.inputs_length, "targets": data.targets_length}
    return lengths, converters[data.layout](pack=data.seqio.pack)


def identity(provider: Any, data: DataConfig, batch_size: int, split: str, hosts: int) -> dict[str, Any]:
    """What decides the batches of a pipeline, as far as it can be known without running it."""
    config = data.seqio
    assert config is not None
    tasks = provider.tasks if isinstance(provider, seqio.Mixture) else [provider]
    rates = {task.name: provider.get_rate(task) if isinstance(provider, seqio.Mixture) else 1.0 for task in tasks}
    return {
        "mixture_or_task": provider.name,
        "rates": rates,
        "preprocessors": {task.name: [_describe(step) for step in task.preprocessors] for task in tasks},
        "vocabularies": {name: _vocabulary(f.vocabulary) for name, f in sorted(provider.output_features.items())},
        "split": split,
        "layout": data.layout,
        "lengths": [data.inputs_length, data.targets_length],
        "pack": config.pack,
        "shuffle": config.shuffle,
        "num_epochs": config.num_epochs,
        "use_cached": config.use_cached,
        "mask_id": config.mask_id,
        "seed": data.seed,
        "batch_size": batch_size,
        "hosts": hosts,
        "versions": {package: _version(package) for package in _PACKAGES},
    }


def _describe(value: Any) -> Any:
    """A preprocessor by its name and its plain arguments."""
    if isinstance(value, functools.partial):
        arguments = [_describe(each) for each in value.args]
        return [_describe(value.func), *arguments, {key: _describe(each) for key, each in value.keywords.items()}]
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, list | tuple):
        return [_describe(each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): _describe(each) for key, each in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"class": type(value).__qualname__, **_describe(dataclasses.asdict(value))}
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return f"{getattr(value, '__module__', '')}.{name}"


def _vocabulary(vocabulary: Any) -> str:
    """Without the path, which may differ between machines."""
    text = str(vocabulary)
    path = getattr(vocabulary, "sentencepiece_model_file", None)
    return text.replace(str(path), "") if path else (f"{text} of {vocabulary.vocab_size}" if "0x" not in text else "")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed by name"


def require_same_pipeline(saved: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises RefusedError where two identities differ, with what differs."""
    # Through JSON, so that tuples are lists on both sides.
    wanted = json.loads(json.dumps(found))
    differences = [
        f"{name}: the checkpoint has {saved.get(name)!r}, this run {wanted.get(name)!r}"
        for name in sorted({*saved, *wanted})
        if saved.get(name) != wanted.get(name)
    ]
    if differences:
        listed = "".join(f"\n  - {line}" for line in differences)
        raise RefusedError(
            "the position of the seqio pipeline belongs to other data; restoring it would go on with wrong rows:"
            f"{listed}\nBring back what differs, or begin anew in another --workdir."
        )


def _require_paired(features: Mapping[str, Any], name: str) -> None:
    """seqio numbers the segments of inputs and of targets apart: an example with one of them empty shifts the rest."""
    encoder, decoder = features.get("encoder_segment_ids"), features.get("decoder_segment_ids")
    if encoder is None or decoder is None:
        return
    wrong = np.flatnonzero(encoder.max(axis=1) != decoder.max(axis=1))
    if wrong.size:
        inputs, targets = encoder[wrong[0]].max(), decoder[wrong[0]].max()
        raise DataError(
            f"data.seqio: in row {wrong[0]} of a batch of {name!r}, seqio has packed {inputs} inputs with {targets} "
            "targets, so that examples attend to the inputs of others; expected as many of both. An example with empty "
            "inputs or targets, or with id 0 inside, does that: filter them, or set "
            "--data.seqio.pack False"
        )
