"""Batches of a registered seqio Task or Mixture, made by tf.data while the model trains. Imports TensorFlow.

The state of such a pipeline is an opaque file per host. tf.data restores it without an error into almost any other
pipeline (another seed, another number of hosts, other rates). A description of everything that determines the batches
is therefore saved beside it, and a difference is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import seqio
import tensorflow as tf

from t5x_like import plugins
from t5x_like.config.data import DataConfig
from t5x_like.config.layouts import has_bidirectional_prefix
from t5x_like.data.store.token_store import Store
from t5x_like.data.stream.feature_converters import Features
from t5x_like.errors import DataError, SafetyError
from t5x_like.utils.digests import json_digest
from t5x_like.utils.json_reader import parse_json
from t5x_like.utils.type_aliases import IntArray

_IDENTITY = "identity.json"
_PACKAGES = ("seqio", "tensorflow", "tensorflow-text", "tensorflow-datasets")


class LiveBatches(Iterator[dict[str, Features]]):
    """Batches of one host, in order, each {"main": features} of NumPy arrays as in `config.batch_spec`.

    No batch is taken before `__next__`: tf.data's own buffers are part of the state that `state_files` returns. The
    class is also a `stream.data_source.DataSource`.

    Raises:
      DataError: the Task, Mixture or split does not exist, or it lacks the features of the layout.
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
          data: Configuration with `seqio`; its layout, lengths and seed are used too.
          batch_size: Rows of a global batch; a multiple of `hosts`.
          split: Split of the Task.
          host, hosts: Index and number of the shards of the examples.
          keeps_state: Whether `state_files` returns a file. Of several processes that read the same shard, one does.
        """
        assert data.seqio is not None
        if batch_size % hosts:
            raise DataError(
                f"training.global_batch_size: found {batch_size} rows for {hosts} hosts, expected a multiple"
            )
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
        tasks = seqio.get_subtasks(self.provider)
        if data.seqio.use_cached and (missing := [task.name for task in tasks if not task.cache_dir]):
            raise DataError(
                f"data.seqio.use_cached: found no cache of {', '.join(missing)}, expected one in a folder of "
                "seqio.set_global_cache_dirs; make it with seqio_cache_tasks, or set use_cached to False"
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
        self._iterator = iter(dataset.prefetch(data.prefetch_batches))
        self.identity = identity(self.provider, data, batch_size, split, hosts)
        """Everything that determines the batches, as JSON values."""
        self._is_saveable = False

    stores: tuple[Store, ...] = ()

    @property
    def origin(self) -> str:
        return f"the seqio Task or Mixture {self.provider.name!r}"

    @property
    def vocab_size(self) -> int:
        """Size of the largest vocabulary of its features, including their sentinels."""
        return max(int(feature.vocabulary.vocab_size) for feature in self.provider.output_features.values())

    def epochs(self, first_row: int) -> dict[str, float]:
        """Return nothing: the number of examples of a Task is not known."""
        del first_row
        return {}

    def describe(self, first_row: int, rows: int, max_tokens: int) -> list[Any]:
        """Return a list of the Tasks. Rows are not shown, because reading them would advance the pipeline."""
        del first_row, rows, max_tokens
        rates: dict[str, float] = self.identity["rates"]
        tasks = ", ".join(f"{name} ({rate / sum(rates.values()):.1%})" for name, rate in rates.items())
        return [f"live from seqio: {self.provider.name}, Tasks: {tasks}"]

    def start(
        self, first_row: int, meta: Mapping[str, str] | None, files: Mapping[str, bytes], first_step: int = 0
    ) -> LiveBatches:
        """Return this iterator, restored from the checkpoint if there is one."""
        del first_row, first_step
        if meta is not None:
            self.restore(files)
        return self

    @property
    def fingerprint(self) -> str:
        """Digest of `identity`."""
        return json_digest(self.identity)[:32]

    def __next__(self) -> dict[str, Features]:
        """Return the next batch.

        Raises:
          DataError: `num_epochs` have ended, the state cannot be saved, or seqio's packing paired the wrong examples.
        """
        features = self._take()
        if features is None:
            assert self.data.seqio is not None
            raise DataError(
                f"data.seqio: {self.provider.name!r} ended after {self._taken:,} batches, which are "
                f"{self.data.seqio.num_epochs} epochs; expected enough for training.num_train_steps. Set "
                "data.seqio.num_epochs to None to repeat the data without end"
            )
        self._taken += 1
        if not self._is_saveable:
            self._require_saveable()
        return {"main": features}

    def rest(self) -> Iterator[Features]:
        """Yield the remaining features of `num_epochs`."""
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
        if not has_bidirectional_prefix(self.data.layout):
            features.pop("decoder_causal_attention", None)
        _require_paired(features, self.provider.name)
        return features

    def close(self) -> None:
        """Stop the threads of tf.data that belong to this iterator."""
        del self._iterator

    def last_indices(self) -> dict[str, IntArray]:
        """Return no indices: rows of a pipeline have only an order."""
        return {}

    def state_files(self) -> dict[str, bytes]:
        """Return the state of this host as files for the checkpoint: one archive per host."""
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
        """Continue where `state_files` was called.

        Args:
          files: Files of all hosts, by name.

        Raises:
          SafetyError: the files belong to other data, another number of hosts, or other versions. The differences are
            listed.
        """
        if not files:
            raise SafetyError(
                "the checkpoint has no position of a seqio pipeline: it was trained on a prepared store. Continue with "
                "that data, or start a new run in another --workdir."
            )
        # Without a file of this host, another host's is read to report the differences.
        state = files.get(self._name(self._host, self._hosts), next(iter(files.values())))
        with zipfile.ZipFile(io.BytesIO(state)) as archive, tempfile.TemporaryDirectory() as folder:
            saved = parse_json(archive.read(_IDENTITY))
            taken = saved.pop("taken")
            require_same_pipeline(saved, self.identity)
            archive.extractall(folder)
            tf.train.Checkpoint(iterator=self._iterator).read(f"{folder}/state").assert_consumed()
        self._taken = taken

    def _require_saveable(self) -> None:
        """Raise DataError if a preprocessor has state of its own: at the first batch, not at the first save."""
        try:
            self._position()
        except tf.errors.FailedPreconditionError as error:
            match = re.search(r"(\w+) is stateful", error.message)
            raise DataError(
                f"data.seqio: the position of {self.provider.name!r} cannot be saved: a preprocessor uses "
                f"{match[1] if match else error.message}, which keeps a state of its own; expected stateless "
                "operations: tf.random.stateless_*, and tf.numpy_function(..., stateful=False) for pure functions"
            ) from None
        self._is_saveable = True

    @staticmethod
    def _name(host: int, hosts: int) -> str:
        return f"seqio-{host:05d}-of-{hosts:05d}.zip"


def validation_batches(
    data: DataConfig, rows: int, num_batches: int, split: str = "validation"
) -> Iterator[dict[str, Features]]:
    """Yield global batches of a split of the Task in its order, one example per row, equal on all hosts.

    They end with the split; a Task without a validation split has none. The last batch is completed with rows of
    padding.
    """
    assert data.seqio is not None
    config = dataclasses.replace(data.seqio, pack=False, shuffle=False, num_epochs=1)
    splits = load_provider(config.mixture_or_task, config.module).splits
    if split not in splits:
        if split == "validation":
            return
        raise DataError(f"data.seqio: found the splits {', '.join(sorted(splits))}, expected {split!r}")
    examples = LiveBatches(dataclasses.replace(data, seqio=config), 1, split=split)
    for _ in range(num_batches):
        batch_rows = [features for features, _ in zip(examples.rest(), range(rows), strict=False)]
        if not batch_rows:
            return
        yield {
            "main": {
                name: np.concatenate(
                    [row[name] for row in batch_rows] + [np.zeros_like(values)] * (rows - len(batch_rows))
                )
                for name, values in batch_rows[0].items()
            }
        }


def load_provider(name: str, module: str | None, where: str = "data.seqio") -> Any:
    """Return a registered Task or Mixture.

    Args:
      where: Dotted path of the fields `mixture_or_task` and `module`, for messages.

    Raises:
      DataError: the module cannot be imported, or the name is not registered.
    """
    # TensorFlow must not reserve the accelerators, which the trainer uses.
    tf.config.set_visible_devices([], "GPU")
    if module:
        try:
            plugins.import_named_module(module, f"{where}.module")
        except ImportError as error:
            raise DataError(f"{where}.module: found {module!r}, which cannot be imported ({error})") from None
    try:
        return seqio.get_mixture_or_task(name)
    except ValueError as error:
        fix = f"name the module that registers it as {where}.module"
        raise DataError(
            f"{where}.mixture_or_task: found {name!r} ({error}), expected a registered Task or Mixture; {fix}"
        ) from None


def converter_for(data: DataConfig, provider: Any) -> tuple[dict[str, int], Any]:
    """Return the task feature lengths and seqio's feature converter for a layout.

    Raises:
      DataError: the Task lacks a feature that the layout needs.
    """
    assert data.seqio is not None
    features = set(provider.output_features)
    is_plain_text = data.layout == "causal_lm" and "inputs" not in features
    needed = {"targets"} if is_plain_text else {"inputs", "targets"}
    if not needed <= features:
        raise DataError(
            f"data.seqio: {provider.name!r} has the features {', '.join(sorted(features))}, expected "
            f"{' and '.join(sorted(needed))} for the layout {data.layout}"
        )
    if is_plain_text:
        return {"targets": data.row_length}, seqio.LMFeatureConverter(pack=data.seqio.pack)
    lengths = {"inputs": data.inputs_length, "targets": data.targets_length}
    match data.layout:
        case "encoder":
            lengths["targets"] = data.inputs_length
            return lengths, seqio.EncoderFeatureConverter(mask_id=data.seqio.mask_id, pack=data.seqio.pack)
        case "encoder_decoder":
            return lengths, seqio.EncDecFeatureConverter(pack=data.seqio.pack)
        case "prefix_lm" | "causal_lm":
            # causal_lm has the same rows as prefix_lm; `_take` drops the feature for attention to the inputs.
            return lengths, seqio.PrefixLMFeatureConverter(pack=data.seqio.pack)
        case unknown:
            assert_never(unknown)


def identity(provider: Any, data: DataConfig, batch_size: int, split: str, hosts: int) -> dict[str, Any]:
    """Return everything that determines the batches of a pipeline, as far as it is known without running it."""
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
    """Return a JSON description of a preprocessor: its name and its arguments of simple types."""
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
    """Return a description without the path, which may differ between machines."""
    text = str(vocabulary)
    path = getattr(vocabulary, "sentencepiece_model_file", None)
    return text.replace(str(path), "") if path else (f"{text} of {vocabulary.vocab_size}" if "0x" not in text else "")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed by name"


def require_same_pipeline(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise SafetyError with the differences if two identities differ."""
    # The JSON round trip turns tuples into lists, as in the saved identity.
    current = json.loads(json.dumps(current))
    differences = [
        f"{name}: the checkpoint has {saved.get(name)!r}, this run {current.get(name)!r}"
        for name in sorted({*saved, *current})
        if saved.get(name) != current.get(name)
    ]
    if differences:
        listed = "".join(f"\n  - {line}" for line in differences)
        raise SafetyError(
            "the position of the seqio pipeline belongs to other data; restoring it would continue with wrong rows:"
            f"{listed}\nRestore the values of the checkpoint, or start a new run in another --workdir."
        )


def _require_paired(features: Mapping[str, Any], name: str) -> None:
    """Raise DataError if seqio's packing paired inputs with the targets of another example.

    seqio numbers the segments of inputs and targets separately, so an example with one of them empty shifts the others.
    """
    encoder, decoder = features.get("encoder_segment_ids"), features.get("decoder_segment_ids")
    if encoder is None or decoder is None:
        return
    wrong = np.flatnonzero(encoder.max(axis=1) != decoder.max(axis=1))
    if wrong.size:
        inputs, targets = encoder[wrong[0]].max(), decoder[wrong[0]].max()
        raise DataError(
            f"data.seqio: in row {wrong[0]} of a batch of {name!r}, seqio has packed {inputs} inputs with {targets} "
            "targets, so that examples attend to the inputs of others; expected equal numbers. The cause is an "
            "example with empty inputs or targets, or with id 0 inside: filter such examples, or set "
            "--data.seqio.pack False"
        )
