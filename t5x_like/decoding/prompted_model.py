"""Model that answers prompts: a `LoadedModel` with its tokenizer and the formats of its prompts."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import numpy.typing as npt

from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.config import DataConfig
from t5x_like.data.objectives.prompts import PromptFormat, SentinelSpans
from t5x_like.data.tokenizers.tokenizer import TokenizerProtocol
from t5x_like.decoding.prompt_format import infill_format, longest_prompt, prompt_format
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.model_loading import Devices, LoadedModel, open_model
from t5x_like.program import Program
from t5x_like.utils.type_aliases import PyTree


@dataclasses.dataclass(frozen=True)
class Formats:
    """Formats of prompts: without gaps, and with gaps if the model fills gaps."""

    plain: PromptFormat
    gaps: PromptFormat | None


@dataclasses.dataclass(frozen=True, eq=False)
class PromptedModel:
    """Model that answers prompts.

    Attributes:
      loaded: The model as it was opened.
    """

    loaded: LoadedModel

    @property
    def directory(self) -> Path:
        return self.loaded.path

    @property
    def program(self) -> Program:
        return self.loaded.program

    @functools.cached_property
    def tokenizer(self) -> TokenizerProtocol:
        """The model's tokenizer."""
        return self.loaded.tokenizer

    @property
    def data(self) -> DataConfig | None:
        """Data that a run was trained on; None for a model that is not a run."""
        return self.loaded.trained_on

    def load(self, step: int | None = None) -> tuple[int, PyTree]:
        """Return a step and its parameters; see `LoadedModel.params`."""
        return self.loaded.params(step)

    def allowed(self, form: PromptFormat) -> npt.NDArray[np.bool_]:
        """Return bool [V]: the ids that answers may hold."""
        model = self.loaded.model
        vocabulary = self.tokenizer.vocabulary
        if form.is_masked_text:
            allowed_V = form.allowed(vocabulary, model.vocab_size)
            allowed_V[[vocabulary.mask_id, *([vocabulary.start_id] if vocabulary.has_start else [])]] = False
            # Rows of documents, and imported models' texts, end without a token that is to be predicted.
            has_eos = self.data is not None and self.data.example_mode == "windows"
            return allowed_V if has_eos else allowed_V & ~self.is_eos_V
        if self.data is not None:
            return form.allowed(vocabulary, model.vocab_size)
        allowed_V = np.arange(model.vocab_size) < vocabulary.base_size + vocabulary.num_sentinels
        allowed_V[[token for token in (model.pad_token_id, model.decoder_start_token_id) if token is not None]] = False
        # Last, because EOS can be the padding id as well.
        return allowed_V | self.is_eos_V

    @property
    def is_eos_V(self) -> npt.NDArray[np.bool_]:
        """Bool [V]: the ids that end a text."""
        return np.isin(np.arange(self.loaded.model.vocab_size), self.loaded.model.eos_ids)

    def longest_prompt(self, form: PromptFormat) -> int | None:
        """Return the tokens of the longest prompt in training; None for a model that is not a run."""
        return None if self.data is None else longest_prompt(self.data, form)


def open_prompted(
    model: str | Path | CheckpointRef | LoadedModel, step: int | None = None, *, devices: Devices = "local"
) -> PromptedModel:
    """Open a model that answers prompts; only its configuration is read. See `model_loading.open_model`.

    Args:
      devices: By default those of this process, since processes share prompts and not arrays.
    """
    return PromptedModel(model if isinstance(model, LoadedModel) else open_model(model, step, devices=devices))


def formats_of(loaded: LoadedModel, mode: str | None) -> Formats:
    """Return the formats of prompts that are continued from left to right under `mode`, which are known before a device
    is touched.

    Raises:
      ConfigError: the model generates no text from left to right, or has no such mode.
    """
    data = loaded.trained_on
    if data is not None:
        gaps = infill_format(data, mode)
        if mode is None and gaps is not None and gaps.mode is None and prompt_format(data, None).infill is not None:
            return Formats(gaps, gaps)
        return Formats(prompt_format(data, mode), gaps)
    model = loaded.model
    if mode is not None:
        raise ConfigError([ConfigProblem("mode", mode, "none: the model was imported, and its modes are not known")])
    if model.decoder is None:
        fix = "an encoder fills masked positions: `generate` and `serve` do so"
        raise ConfigError([ConfigProblem(str(loaded.path), "an encoder alone", "a model with a decoder", fix)])
    if model.encoder is None:
        return Formats(PromptFormat(None, ends_in_eos=False, bidirectional=False, sentinels=False), None)
    spans = PromptFormat(None, ends_in_eos=True, bidirectional=False, sentinels=True, infill=SentinelSpans())
    return Formats(dataclasses.replace(spans, infill=None), spans)


def ends_in_eos(tokenizer: TokenizerProtocol, form: PromptFormat) -> PromptFormat:
    """Return the format with EOS at the end of the prompt only if the tokenizer of an imported encoder-decoder puts it
    there."""
    if tokenizer.ends_in_eos is not None and form.ends_in_eos != tokenizer.ends_in_eos:
        return dataclasses.replace(form, ends_in_eos=tokenizer.ends_in_eos and form.ends_in_eos)
    return form
