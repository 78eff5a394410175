"""A model that answers prompts, opened from a run's directory or from what `convert --from` wrote."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like import run_directory
from t5x_like.checkpoints.integrity import SUMS
from t5x_like.config import (
    CausalLM,
    ConfigError,
    DataConfig,
    ModelConfig,
    Problem,
    RefusedError,
    RunConfig,
    SpanCorruption,
    TrainingConfig,
)
from t5x_like.decoding.prompts import PromptFormat, gaps_format, longest_prompt, prompt_format
from t5x_like.decoding.spelling import LibraryTokenizer, Speller, of_directory
from t5x_like.decoding.trained import open_trained
from t5x_like.interop.adapted import restore_whole
from t5x_like.interop.huggingface.directories import KEPT
from t5x_like.interop.imported import MODEL, read_model
from t5x_like.program import Program, assemble

Tree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class PromptedModel:
    """Attributes:
    directory: Of the run or the import.
    program: For this process's devices.
    speller: Text to ids.
    data: What a run was trained on; None of an imported model.
    load: Step -> (step, parameters); None: the newest.
    """

    directory: Path
    program: Program
    speller: Speller
    data: DataConfig | None
    load: Callable[[int | None], tuple[int, Tree]]

    def allowed(self, form: PromptFormat) -> npt.NDArray[np.bool_]:
        """[V]: the ids that may come out."""
        model = self.program.run.model
        if self.data is not None:
            return form.allowed(self.speller.vocabulary, model.vocab_size)
        vocabulary = self.speller.vocabulary
        allowed_V = np.arange(model.vocab_size) < vocabulary.base_size + vocabulary.num_sentinels
        allowed_V[[token for token in (model.pad_id, model.start_id) if token is not None]] = False
        allowed_V[[token for token in model.eos_ids if token < model.vocab_size]] = True
        return allowed_V

    def longest_prompt(self, form: PromptFormat) -> int | None:
        return None if self.data is None else longest_prompt(self.data, form)


def checkpoint_digest(directory: Path, step: int) -> str:
    """Of the checkpoint's list of checksums: the same wherever the directory is.

    Raises:
      RefusedError: there is no such checkpoint, or it has no such list.
    """
    path = directory / run_directory.CHECKPOINTS / str(step) / SUMS
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    except OSError as error:
        raise RefusedError(f"{path}: unreadable ({error.strerror}), expected a checkpoint's checksums") from None


@dataclasses.dataclass(frozen=True)
class Formats:
    """How prompts are laid out: without gaps, and with them where the model fills gaps."""

    plain: PromptFormat
    gaps: PromptFormat | None


def formats_of(directory: Path, mode: str | None) -> Formats:
    """The formats of prompts under `mode`, known before a device is touched.

    Raises:
      ConfigError: there is no run or import, it generates nothing, or has no such mode.
    """
    if not (directory / MODEL).is_file():
        data = run_directory.read_config(directory).data
        gaps = gaps_format(data, mode)
        if mode is None and gaps is not None and gaps.mode is None and prompt_format(data, None).gaps is not None:
            return Formats(gaps, gaps)
        return Formats(prompt_format(data, mode), gaps)
    model, _ = read_model(directory)
    if mode is not None:
        raise ConfigError([Problem("mode", mode, "none: the model was imported, and its modes are not known")])
    if model.decoder is None:
        fix = "an encoder fills masks but generates no text"
        raise ConfigError([Problem(str(directory), "an encoder alone", "a model with a decoder", fix)])
    if model.encoder is None:
        return Formats(PromptFormat(None, ends_in_eos=False, bidirectional=False, sentinels=False), None)
    spans = PromptFormat(None, ends_in_eos=True, bidirectional=False, sentinels=True, gaps="spans")
    return Formats(dataclasses.replace(spans, gaps=None), spans)


def open_model(directory: Path, devices: Sequence[Any]) -> PromptedModel:
    """Opens the model in `directory` on these devices; nothing in it is changed.

    Raises:
      UserError: there is none, it does not fit the devices, or its tokenizer is missing.
    """
    if not (directory / MODEL).is_file():
        trained = open_trained(directory, devices)
        return PromptedModel(
            directory,
            trained.program,
            trained.store.tokenizer,
            trained.run.data,
            trained.params,
        )
    model, _ = read_model(directory)
    program = assemble(never_trained(model, len(devices)), devices)

    def load(step: int | None) -> tuple[int, Tree]:
        return restore_whole(directory, model, step, program.abstract_params)[:2]

    speller = of_directory(directory / KEPT, model)
    return PromptedModel(directory, program, speller, None, load)


def ends_in_eos(speller: Speller, form: PromptFormat) -> PromptFormat:
    """Of an imported encoder-decoder: EOS behind the prompt only if its tokenizer puts it there."""
    if isinstance(speller, LibraryTokenizer) and form.ends_in_eos != speller.ends_in_eos:
        return dataclasses.replace(form, ends_in_eos=speller.ends_in_eos and form.ends_in_eos)
    return form


def never_trained(model: ModelConfig, devices: int) -> RunConfig:
    """A run of an imported model, for what is not training."""
    single = model.encoder is None
    data = DataConfig(
        layout="causal_lm" if single else "encoder_decoder",
        mixture=(CausalLM(),) if single else (SpanCorruption(name="span_corruption"),),
        inputs_length=16,
        targets_length=16,
    )
    training = TrainingConfig(num_train_steps=1, batch_size=devices)
    return RunConfig(name="imported", model=model, data=data, training=training)
