"""Loading of models: a training run or one of its steps, an imported model, or a Hugging Face directory.

`open_model` reads the configuration only. Tokenizer, program and parameters are loaded when they are first used, so
that a command can refuse its options before it touches a device.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, assert_never

import jax

from t5x_like import run_directory
from t5x_like.adapters.restore import restore_with_adapters
from t5x_like.checkpoints import model_dir
from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.checkpoints.interface import Checkpoints
from t5x_like.checkpoints.model_dir import HUGGINGFACE_DIR
from t5x_like.checkpoints.opening import open_checkpoints
from t5x_like.config import (
    CausalLM,
    CheckpointConfig,
    DataConfig,
    MaskedLM,
    ModelConfig,
    PrefixLM,
    RunConfig,
    TrainingConfig,
)
from t5x_like.config.batch_sizes import batch_sizes
from t5x_like.config.validation import validate
from t5x_like.data.store.prepare import open_stores
from t5x_like.data.store.token_store import Store
from t5x_like.data.stream.reference_log_probs import attach_from
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.data.tokenizers.loading import has_tokenizer, kept_tokenizer, load_directory_tokenizer
from t5x_like.data.tokenizers.tokenizer import Tokenizer, have_same_pieces
from t5x_like.errors import ConfigError, ConfigProblem, DataError, SafetyError
from t5x_like.interop.huggingface.checkpoint import HuggingFaceModel, open_directory
from t5x_like.program import Program, build_program
from t5x_like.sharding.attention_choice import attention_for_platform
from t5x_like.storage.mirror import fetch
from t5x_like.utils.sanitize import say
from t5x_like.utils.type_aliases import PyTree

ModelKind = Literal["run", "imported", "huggingface"]
Devices = Sequence[Any] | Literal["all", "local"]
"""Devices of a model: all of the job, those of this process, or a list."""

_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_BATCH_SIZE = 8


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
    """Model that was opened from a directory. Nothing in the directory is changed.

    Attributes:
      path: Directory of the model.
      kind: A training run, a model that `convert --from` wrote, or a Hugging Face directory.
      run: Configuration of the run. A model that is not a run gets one that is never trained: its model, with the data
        that it is evaluated on or, without data, the layout of its architecture.
      step: Step that `params` reads by default; None for the newest.
      devices: Devices of `program`.
      has_data: `run.data` names data: a run's own, or those that the model is evaluated on.
      source: Tensors of a Hugging Face directory; otherwise None.
      trained: Configuration of a training run; None for a model that is not a run.
    """

    path: Path
    kind: ModelKind
    run: RunConfig
    step: int | None = None
    devices: Devices = "all"
    has_data: bool = True
    source: HuggingFaceModel | None = None
    trained: RunConfig | None = None

    @property
    def model(self) -> ModelConfig:
        return self.run.model

    @property
    def trained_on(self) -> DataConfig | None:
        """Data of the training run; None for a model that is not a run."""
        return None if self.trained is None else self.trained.data

    @property
    def has_own_data(self) -> bool:
        """True for a training run with the data that it was trained on."""
        return self.trained is not None and self.run.data == self.trained.data

    @functools.cached_property
    def program(self) -> Program:
        """The run's program on the devices.

        Raises:
          ConfigError: the run does not fit the devices.
        """
        match self.devices:
            case "all":
                devices: Sequence[Any] = jax.devices()
            case "local":
                devices = jax.local_devices()
            case _:
                devices = self.devices
        run = self.run if self.has_data else _with_divisible_batch(self.run, len(devices))
        model = attention_for_platform(run.model, devices[0].platform)
        if model != run.model:
            # Training refuses instead: a run keeps the numbers of its backend.
            note = (
                f"attention {run.model.attention!r} is for other devices than these: {model.attention!r} runs instead"
            )
            say(f"{self.path}: {note}", file=sys.stderr)
        return build_program(dataclasses.replace(run, model=model), devices)

    @functools.cached_property
    def stores(self) -> tuple[Store, ...]:
        """Prepared stores of the data; empty for a run that reads a seqio Task live, and for a model without data.

        Raises:
          DataError: a store is missing, or its tokenizer is not the model's.
        """
        if not self.has_data or self.run.data.seqio is not None:
            return ()
        stores = open_stores(self.run.data)
        own = self._trained_tokenizer if self.trained is not None else self._own_tokenizer
        if own is not None and not have_same_pieces(stores[0].tokenizer, own):
            raise DataError(
                f"{self.path}: found another tokenizer ({own.vocabulary.base_size:,} pieces) than that of "
                f"{stores[0].path} ({stores[0].tokenizer.vocabulary.base_size:,}), by whose ids it would read other "
                "text; prepare the data with --data.tokenizer.path and its spiece.model"
            )
        if self.has_own_data and self.run.data.preference is not None:
            attach_from(self.path, self.run.data, stores)
        return stores

    @property
    def _stores_if_prepared(self) -> tuple[Store, ...]:
        """The stores; empty if they are missing and the run has kept its tokenizer, without which it needs them."""
        try:
            return self.stores
        except DataError:
            if kept_tokenizer(self.path / run_directory.TOKENIZER) is None:
                raise
            return ()

    @property
    def store(self) -> Store:
        """The first store, whose tokenizer is that of all stores.

        Raises:
          DataError: there is none: the run reads a seqio Task live.
        """
        return (self.stores or open_stores(self.run.data))[0]

    @property
    def has_heldout_data(self) -> bool:
        """True if there is held-out text, or a Task that is read live, to evaluate the model on."""
        return bool(self.stores) or (self.has_data and self.run.data.seqio is not None)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model's ids.

        Raises:
          DataError: the model has no tokenizer that can be read here.
          SafetyError: the package that reads its tokenizer.json is not installed.
        """
        if self.has_own_data and (kept := kept_tokenizer(self.path / run_directory.TOKENIZER)) is not None:
            return kept
        if self.has_data and (self.stores or self.kind == "run"):
            return self.store.tokenizer
        return load_directory_tokenizer(self._tokenizer_dir, self.model)

    @functools.cached_property
    def tokenizer_if_known(self) -> Tokenizer | None:
        """The tokenizer; None if the model has none that can be read here."""
        if self.has_own_data and self.run.data.seqio is None:
            return self.tokenizer
        if self.stores:
            return self.stores[0].tokenizer
        return self._own_tokenizer

    @functools.cached_property
    def _own_tokenizer(self) -> Tokenizer | None:
        """Tokenizer in the directory of a model that is not a run."""
        if self.kind == "run" or not has_tokenizer(self._tokenizer_dir):
            return None
        try:
            return load_directory_tokenizer(self._tokenizer_dir, self.model)
        except SafetyError:  # The package that reads tokenizer.json is not installed.
            return None

    @functools.cached_property
    def _trained_tokenizer(self) -> Tokenizer | None:
        """Tokenizer that a run was trained with; None if it is that of its own data."""
        if self.trained is None or self.has_own_data:
            return None
        kept = kept_tokenizer(self.path / run_directory.TOKENIZER)
        return open_stores(self.trained.data)[0].tokenizer if kept is None else kept

    @property
    def _tokenizer_dir(self) -> Path:
        return self.path if self.kind == "huggingface" else self.path / HUGGINGFACE_DIR

    @functools.cached_property
    def _checkpoints(self) -> Checkpoints:
        return open_checkpoints(self.path, self.run.checkpoints, read_only=True)

    def steps(self) -> list[int]:
        """Return the steps that are saved now; [0] for a Hugging Face directory."""
        return [0] if self.source is not None else self._checkpoints.steps()

    @property
    def abstract_params(self) -> PyTree:
        """The whole parameters, float32, as `jax.ShapeDtypeStruct`s with the shardings of `program`."""
        return self.program.abstract_whole_params

    def params(
        self, step: int | None = None, abstract_params: PyTree | None = None, *, check_data: bool = True
    ) -> tuple[int, PyTree]:
        """Return a checkpoint's step and parameters, with adapters merged into their base.

        Args:
          step: None for the step that the model was opened with, or else the newest.
          abstract_params: Parameters as `jax.ShapeDtypeStruct`s with shardings; None for `LoadedModel.abstract_params`.
          check_data: Require that a run's store is there and is the one that the checkpoint was trained on.

        Raises:
          SafetyError: there is no such checkpoint or it is damaged, it was trained on other data, or its adapters
            belong to another base.
          ConfigError: a step of a Hugging Face directory, which holds one model.
        """
        step = self.step if step is None else step
        abstract_params = self.abstract_params if abstract_params is None else abstract_params
        if self.source is not None:
            if step not in (None, 0):
                expected = "none: a Hugging Face directory holds one model"
                raise ConfigError([ConfigProblem(f"{self.path}:{step}", "a step", expected)])
            return 0, self.source.params(abstract_params)
        lora = self.run.training.lora
        step, params, meta = restore_with_adapters(self._checkpoints, lora, self.model, step, abstract_params)
        if check_data and self.has_own_data and self._stores_if_prepared:
            self._require_same_data(meta["data"]["fingerprint"])
        return step, params

    def _require_same_data(self, expected: str) -> None:
        found = TrainingStream(self.stores, self.run.data, batch_sizes(self.run.training)).fingerprint
        if found != expected:
            raise SafetyError(
                f"{self.stores[0].path}: found data with the fingerprint {found}, expected {expected}, on which the "
                "checkpoint was trained: with another tokenizer its ids would mean other text. Bring the store of the "
                "run back."
            )

    def digest(self, step: int) -> str:
        """Return the digest of a checkpoint; see `checkpoint_digest`."""
        return checkpoint_digest(self.path, step)


def model_kind(path: Path) -> ModelKind:
    """Return the kind of the model in `path`.

    Raises:
      ConfigError: there is no model.
    """
    if (path / model_dir.MODEL).is_file():
        return "imported"
    if (path / run_directory.CHECKPOINTS).is_dir():
        return "run"
    is_config = (path / "config.json").is_file()
    if is_config and any(file.suffix in _WEIGHT_SUFFIXES for file in path.iterdir()):
        return "huggingface"
    if (path / run_directory.CONFIG).is_file():
        return "run"  # A run without a checkpoint is refused when a step is asked for.
    missing = "a file" if path.is_file() else "no such directory"
    found = "no checkpoints in it" if path.is_dir() else missing
    expected = (
        "the directory of a run written by `t5x-like train`, of a model written by `t5x-like convert --from`, or of a "
        "Hugging Face model; DIR:STEP names a step"
    )
    raise ConfigError([ConfigProblem(str(path), found, expected)])


def open_model(
    model: str | Path | CheckpointRef,
    step: int | None = None,
    *,
    devices: Devices = "all",
    data_from: RunConfig | None = None,
) -> LoadedModel:
    """Open a model; only its configuration is read.

    Args:
      model: Directory, or a string `DIR:STEP`.
      step: Step to load; None for the one in `model`, or else the newest.
      devices: Devices of the model's program.
      data_from: Configuration whose data a model is evaluated with, and its batch size and mesh unless the model is a
        run. None: a run's own data; a model that is not a run has no held-out text.

    Raises:
      ConfigError: there is no model, or it does not fit `data_from`.
      DataError: the files of the model are malformed.
    """
    reference = model if isinstance(model, CheckpointRef) else _reference(model)
    path, step = reference.path, reference.step if step is None else step
    kind = model_kind(path)
    match kind:
        case "run":
            trained = run_directory.read_config(path)
            own = trained if data_from is None else _on_other_data(trained, data_from)
            return LoadedModel(path, kind, own, step, devices, trained=trained)
        case "imported":
            source, config = None, model_dir.read_model(path)[0]
        case "huggingface":
            source = open_directory(path)
            config = source.model
        case _:
            assert_never(kind)
    run = inference_run(path.resolve().name, config) if data_from is None else _evaluation_run(path, config, data_from)
    return LoadedModel(path, kind, run, step, devices, data_from is not None, source)


def _reference(model: str | Path) -> CheckpointRef:
    if isinstance(model, Path):
        return CheckpointRef(model)
    reference = CheckpointRef.parse(model)
    fetch(reference.path)
    return reference


def checkpoint_digest(path: Path, step: int) -> str:
    """Return the digest of a checkpoint's list of checksums, which does not depend on where the directory is. For a
    Hugging Face directory, which has no such list, return the digest of its files' names, sizes and times.

    Raises:
      SafetyError: there is no such checkpoint, or it has no checksums.
    """
    if model_kind(path) == "huggingface":
        return _listing_digest(path)
    return open_checkpoints(path, CheckpointConfig(), read_only=True).digest(step)


def _listing_digest(path: Path) -> str:
    files = [(file.name, file.stat()) for file in sorted(path.iterdir()) if file.is_file()]
    listing = "".join(f"{name} {stat.st_size} {stat.st_mtime_ns}\n" for name, stat in files)
    return hashlib.sha256(listing.encode()).hexdigest()[:32]


def inference_run(name: str, model: ModelConfig) -> RunConfig:
    """Return a run of a model that is not trained, with the data layout of its architecture.

    Lengths are T5's, or at most the positions that the model has learned. Nothing else of the data is read.
    """
    longest = min(
        (stack.max_positions for stack in model.stacks.values() if stack.positions == "learned"), default=1024
    )
    inputs, targets = min(512, longest // 2), min(128, longest // 2)
    match model.architecture:
        case "encoder":
            data = DataConfig(layout="encoder", mixture=(MaskedLM(),), inputs_length=inputs, targets_length=0)
        case "decoder":
            data = DataConfig(layout="causal_lm", mixture=(CausalLM(),), inputs_length=inputs, targets_length=targets)
        case "encoder_decoder":
            mixture = (PrefixLM(name="text_to_text"),)
            data = DataConfig(layout="encoder_decoder", mixture=mixture, inputs_length=inputs, targets_length=targets)
        case _:
            assert_never(model.architecture)
    training = TrainingConfig(num_train_steps=1, global_batch_size=_BATCH_SIZE)
    return RunConfig(name=name, model=model, data=data, training=training)


def _with_divisible_batch(run: RunConfig, devices: int) -> RunConfig:
    rows = -(-run.training.global_batch_size // devices) * devices
    return dataclasses.replace(run, training=dataclasses.replace(run.training, global_batch_size=rows))


def _on_other_data(trained: RunConfig, data_from: RunConfig) -> RunConfig:
    """Return the run with the data that it is evaluated on."""
    run = dataclasses.replace(trained, data=data_from.data, evaluation=data_from.evaluation)
    problems = validate(run)
    if problems:
        raise ConfigError(problems)
    return run


def _evaluation_run(path: Path, model: ModelConfig, data_from: RunConfig) -> RunConfig:
    training = dataclasses.replace(data_from.training, lora=None, freeze=(), distillation=None)
    run = dataclasses.replace(data_from, name=path.resolve().name, model=model, training=training, initialize_from=None)
    problems = validate(run)
    if problems:
        raise ConfigError(problems)
    return run
