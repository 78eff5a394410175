"""Content of an account: sections of figures, and the common formulas beside them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from t5x_like.config import ModelConfig, RunConfig
from t5x_like.planning.estimate.inference import Inference
from t5x_like.planning.estimate.parameters import ParameterCount, total

Unit = Literal["parameters", "FLOP", "bytes", "seconds", "tokens", "tokens per second", "rows", "times", ""]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number of an account, in `unit`."""

    name: str
    value: float
    unit: Unit
    note: str = ""


@dataclasses.dataclass(frozen=True)
class CommonFormula:
    """A formula or statement that is often quoted.

    Attributes:
      formula: The formula.
      value: Its value for this model; None for a statement.
      remark: What it leaves out or gets wrong, in complete sentences.
    """

    formula: str
    value: float | None
    unit: Unit
    remark: str


@dataclasses.dataclass(frozen=True)
class Section:
    title: str
    figures: tuple[Figure, ...]
    common: tuple[CommonFormula, ...] = ()


@dataclasses.dataclass(frozen=True)
class Account:
    """Sections of one model; `name` is as the user wrote it."""

    name: str
    sections: tuple[Section, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the account as a JSON document."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model with what several sections need.

    Attributes:
      inference: The model on its machine, with the lengths of prompt and answer.
      parts: Part of the model -> its parameters.
      run: Run that trains the model, or None.
    """

    inference: Inference
    parts: dict[str, ParameterCount]
    run: RunConfig | None = None

    @property
    def model(self) -> ModelConfig:
        return self.inference.model

    @property
    def parameters(self) -> int:
        return total(self.parts).count

    @property
    def active(self) -> int:
        """Parameters that one token uses."""
        return total(self.parts).active

    @property
    def generates(self) -> bool:
        return generates(self.model)

    @property
    def is_pair(self) -> bool:
        """True for an encoder-decoder."""
        return self.model.architecture == "encoder_decoder"

    @property
    def target_length(self) -> int:
        """Tokens of the decoder in a row of prompt and answer."""
        prompt, answer = self.inference.prompt, self.inference.answer
        return answer if self.is_pair else prompt + answer if self.generates else prompt

    @property
    def row_tokens(self) -> int:
        """Tokens of a row over both stacks: prompt and answer, or the prompt alone."""
        return self.inference.prompt + (self.inference.answer if self.generates else 0)


def generates(model: ModelConfig) -> bool:
    """Return whether a model has a decoder with a language-model head."""
    return model.decoder is not None and model.task_head is None
