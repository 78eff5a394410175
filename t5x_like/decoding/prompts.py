"""A prompt in the form that the model was trained on, and which tokens may come out of it. Knows no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from t5x_like.config import (
    Bart,
    BlankInfilling,
    CausalLM,
    CausalMasking,
    ConfigError,
    DataConfig,
    FillInTheMiddle,
    MaskedLM,
    Objective,
    PrefixLM,
    Problem,
    SpanCorruption,
    Supervised,
)
from t5x_like.config.objectives import WITHOUT_INPUTS, Mode
from t5x_like.data.vocabulary import EOS_ID, PAD_ID, Vocabulary

GapStyle = Literal["spans", "blanks", "middle", "moved", "whole"]
"""How an objective fills gaps.
spans: a sentinel stands in each gap, and the targets are each sentinel and its span (T5, UL2's R and X).
blanks: the same, each span ended by EOS and its sentinel given (GLM).
middle: one gap; prefix, suffix and middle are each begun by a marker (fill-in-the-middle).
moved: spans follow the text, each begun by the sentinel in its gap (CM3).
whole: a mask token stands in each gap, and the targets are the whole text (BART).
"""
_GAPS: dict[type[Objective], GapStyle] = {
    SpanCorruption: "spans",
    BlankInfilling: "blanks",
    FillInTheMiddle: "middle",
    CausalMasking: "moved",
    Bart: "whole",
}


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """The inputs of an objective, as the layout lays them out.

    Attributes:
      mode: Mode token in front.
      ends_in_eos: The prompt is an objective's whole inputs, closed by EOS; otherwise it is the beginning of a text
        that the model goes on with.
      bidirectional: In a single stream, the tokens of the prompt see each other in both directions.
      sentinels: The objective's targets are spans labelled by sentinels.
      gaps: How it fills gaps in a text; None: it does not.
    """

    mode: Mode | None
    ends_in_eos: bool
    bidirectional: bool
    sentinels: bool
    gaps: GapStyle | None = None

    def ids(self, text: Sequence[int], vocabulary: Vocabulary) -> list[int]:
        """The prompt's token ids, without the BOS that a decoder's stream starts with."""
        mode = [] if self.mode is None else [vocabulary.mode_id(self.mode)]
        return [*mode, *text, *([EOS_ID] if self.ends_in_eos else [])]

    def allowed(self, vocabulary: Vocabulary, table_size: int) -> npt.NDArray[np.bool_]:
        """[table_size], the model's rows: True for the ids that the objective's targets can hold."""
        targets = vocabulary.base_size + (vocabulary.num_sentinels if self.sentinels else 0)
        allowed_V = np.arange(table_size) < targets
        allowed_V[PAD_ID] = False
        return allowed_V


def objective_format(objective: Objective, data: DataConfig) -> PromptFormat:
    """How the inputs of `objective` look in the layout of `data`."""
    causal = isinstance(objective, WITHOUT_INPUTS)
    return PromptFormat(
        mode=objective.mode,
        ends_in_eos=not causal,
        bidirectional=data.layout == "prefix_lm" and not causal,
        sentinels=not isinstance(objective, CausalLM | PrefixLM | Bart | Supervised),
        gaps=_GAPS.get(type(objective)),
    )


def prompt_format(data: DataConfig, mode: str | None) -> PromptFormat:
    """The format for a prompt under `mode`.

    Without a mode: S if it was trained, or else the mixture's first mode; in a mixture without modes, the format of its
    prefix-LM, causal or span-corruption objective, the first of these that is there.

    Raises:
      ConfigError: an encoder, which generates nothing, or a mode that the mixture does not have.
    """
    if data.labelled is not None:
        found = f"a run that trained a head of kind {data.labelled.kind}"
        raise ConfigError([Problem("data.mixture", found, "a run that generates text", "`embed` or `eval` read heads")])
    if data.seqio is not None:
        found = f"{data.seqio.mixture_or_task!r}, read live: its preprocessors alone know the form of its inputs"
        raise ConfigError([Problem("data.seqio", found, "a run on a prepared store")])
    objectives = [objective for objective in data.objectives if not isinstance(objective, MaskedLM)]
    if data.layout == "encoder" or not objectives:
        found = f"layout '{data.layout}', objectives {', '.join(objective.name for objective in data.objectives)}"
        fix = "an encoder fills masks but generates no text"
        raise ConfigError([Problem("data", found, "a run with a decoder", fix)])
    by_mode: dict[str, Objective] = {}
    for objective in objectives:
        if objective.mode is not None:
            by_mode.setdefault(objective.mode, objective)
    if mode is not None:
        if mode not in by_mode:
            expected = f"one of {', '.join(by_mode)}" if by_mode else "none: the run was trained without mode tokens"
            raise ConfigError([Problem("mode", mode, expected)])
        return objective_format(by_mode[mode], data)
    if by_mode:
        return objective_format(by_mode.get("S", next(iter(by_mode.values()))), data)
    order = ("supervised", "prefix_lm", "causal_lm", "span_corruption")

    def place(objective: Objective) -> int:
        return order.index(objective.kind) if objective.kind in order else len(order)

    return objective_format(min(objectives, key=place), data)


def gaps_format(data: DataConfig, mode: str | None) -> PromptFormat | None:
    """The format for a prompt with gaps under `mode`: without one, that of the first objective that fills gaps.

    None: no objective does, or not under this mode.
    """
    asked = None if mode is None else prompt_format(data, mode).mode
    fitting = (one for one in data.objectives if mode is None or one.mode == asked)
    return next((objective_format(one, data) for one in fitting if type(one) in _GAPS), None)


def longest_prompt(data: DataConfig, form: PromptFormat) -> int:
    """Tokens of the longest prompt that the model has seen in training: an objective's inputs, or a row of text."""
    return data.inputs_length if form.ends_in_eos else data.row_length
