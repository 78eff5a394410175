"""What can be evaluated, opened: a run's directory, what `convert --from` wrote, or a Hugging Face directory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from t5x_like import run_directory
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config import (
    CausalLM,
    ConfigError,
    DataConfig,
    DataError,
    MaskedLM,
    ModelConfig,
    PrefixLM,
    Problem,
    RunConfig,
    TokenizerConfig,
    TrainingConfig,
)
from t5x_like.config.validate import validate
from t5x_like.data import tokenizers
from t5x_like.data.prepare import open_stores
from t5x_like.data.store import Store
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.decoding.trained import open_trained
from t5x_like.interop import imported
from t5x_like.interop.adapted import restore_whole
from t5x_like.interop.huggingface.directories import KEPT, open_directory
from t5x_like.program import Program, assemble

Tree = Any
Kind = str
RUN, IMPORTED, HUGGINGFACE = "run", "imported", "huggingface"


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
    """A model that can be evaluated.

    Attributes:
      kind: RUN, IMPORTED or HUGGINGFACE. Only a run's directory is written into.
      run: Its configuration; of another model one that has its model, and the data that it is evaluated on.
      stores: Of that data; none for a run that reads Tasks live, and for a model without data.
      tokenizer: By which its ids are text; None if that is not known here.
      load: Step, or None for the newest -> (step, parameters on the devices). Raises UserError.
      steps: All steps that are there now.
    """

    path: Path
    kind: Kind
    run: RunConfig
    program: Program
    stores: tuple[Store, ...]
    tokenizer: Tokenizer | None
    load: Callable[[int | None], tuple[int, Tree]]
    steps: Callable[[], list[int]]

    @property
    def has_text(self) -> bool:
        """Whether there is held-out text or a live Task to score."""
        return bool(self.stores) or self.run.data.seqio is not None


def kind_of(path: Path) -> Kind:
    """Raises ConfigError where there is none of the three."""
    if (path / imported.MODEL).is_file():
        return IMPORTED
    if (path / run_directory.CHECKPOINTS).is_dir():
        return RUN
    if (path / "config.json").is_file() and any(name.suffix in (".safetensors", ".bin") for name in path.iterdir()):
        return HUGGINGFACE
    if (path / run_directory.CONFIG).is_file():
        return RUN  # One that has saved nothing yet: it is said when a step is asked for.
    found = "no checkpoints in it" if path.is_dir() else "no such directory"
    expected = "a run directory, what `t5x-like convert --from` wrote, or a Hugging Face directory; DIR:STEP for a step"
    raise ConfigError([Problem(str(path), found, expected)])


def open_model(path: Path, like: RunConfig | None = None) -> Opened:
    """Opens a model on this machine's devices; nothing in its directory is changed.

    Args:
      like: Whose data, batch size and mesh a model that is no run is evaluated with. None: without held-out text.

    Raises:
      UserError: there is no model, it does not fit the devices or the data, or its ids are not those of the data.
    """
    kind = kind_of(path)
    if kind == RUN:
        trained = open_trained(path)
        tokenizer = trained.stores[0].tokenizer if trained.stores else None
        run, program, stores = trained.run, trained.program, trained.stores
        return Opened(path, kind, run, program, stores, tokenizer, trained.params, trained.checkpoints.steps)
    source = open_directory(path) if kind == HUGGINGFACE else None
    model = imported.read_model(path)[0] if source is None else source.model
    run = _run_for(path, model, like)
    program = assemble(run, jax.devices())
    own = own_tokenizer(path if source is not None else path / KEPT, model)
    stores = open_stores(run.data) if like is not None and like.data.seqio is None else ()
    if stores:
        _require_same_ids(path, own, stores[0])
    tokenizer = stores[0].tokenizer if stores else own

    def load(step: int | None) -> tuple[int, Tree]:
        if source is not None:
            _require_step(path, step, [0])
            return 0, source.params(program.abstract_params)
        return restore_whole(path, model, step, program.abstract_params)[:2]

    if source is not None:
        return Opened(path, kind, run, program, stores, tokenizer, load, lambda: [0])
    checkpoints = CheckpointManager(path / run_directory.CHECKPOINTS, run.checkpoints, read_only=True)
    return Opened(path, kind, run, program, stores, tokenizer, load, checkpoints.steps)


def own_tokenizer(folder: Path, model: ModelConfig) -> Tokenizer | None:
    """The SentencePiece model beside a Hugging Face model; None without one.

    Raises:
      DataError: it is none.
    """
    for name in ("spiece.model", "tokenizer.model"):
        if (folder / name).is_file():
            tokenizer = tokenizers.load(TokenizerConfig(num_sentinels=0), folder / name)
            return tokenizer if tokenizer.vocabulary.base_size <= model.vocab_size else None
    return None


def _run_for(path: Path, model: ModelConfig, like: RunConfig | None) -> RunConfig:
    """A run of this model, that is never trained."""
    if like is None:
        training = TrainingConfig(num_train_steps=1, batch_size=8)
        return RunConfig(name=path.name, model=model, data=_data_for(model), training=training)
    training = dataclasses.replace(like.training, lora=None, freeze=())
    run = dataclasses.replace(like, name=path.name, model=model, training=training, initialize_from=None)
    problems = validate(run)
    if problems:
        raise ConfigError(problems)
    return run


def _data_for(model: ModelConfig) -> DataConfig:
    """The layout of a model whose training is not known: a decoder is a causal one. Nothing of it is read but that and
    the lengths, which are T5's, or what the model has learned positions for."""
    longest = min(
        (stack.max_positions for stack in model.stacks.values() if stack.positions == "learned"), default=1024
    )
    inputs, targets = min(512, longest // 2), min(128, longest // 2)
    if model.architecture == "encoder":
        return DataConfig(layout="encoder", mixture=(MaskedLM(),), inputs_length=inputs, targets_length=0)
    if model.architecture == "decoder":
        return DataConfig(layout="causal_lm", mixture=(CausalLM(),), inputs_length=inputs, targets_length=targets)
    mixture = (PrefixLM(name="text_to_text"),)
    return DataConfig(layout="encoder_decoder", mixture=mixture, inputs_length=inputs, targets_length=targets)


def _require_same_ids(path: Path, own: Tokenizer | None, store: Store) -> None:
    if own is not None and not store.tokenizer.has_pieces_of(own):
        raise DataError(
            f"{path}: found another tokenizer ({own.vocabulary.base_size:,} pieces) than that of {store.path} "
            f"({store.tokenizer.vocabulary.base_size:,}), by whose ids it would read other text; prepare the data with "
            "--data.tokenizer.path and its spiece.model"
        )


def _require_step(path: Path, step: int | None, steps: list[int]) -> None:
    if step is not None and step not in steps:
        raise ConfigError([Problem(f"{path}:{step}", "a step", "none: a Hugging Face directory holds one model")])


@functools.lru_cache(maxsize=8)
def fingerprint(path: Path, step: int) -> str:
    """By which a checkpoint's answers are known to be its own: its list of checksums, or its files' sizes and times."""
    import hashlib

    folder = path / run_directory.CHECKPOINTS / str(step)
    sums = folder / "SHA256SUMS"
    if sums.is_file():
        return hashlib.sha256(sums.read_bytes()).hexdigest()[:16]
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else []
    listed = "".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()[:16]
