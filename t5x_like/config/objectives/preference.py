"""Preference pairs: of two answers to a prompt, the one that was chosen becomes more likely than the rejected one."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import pydantic

from t5x_like.config.bounds import PositiveFloat, PositiveInt
from t5x_like.config.dataclass import config_dataclass
from t5x_like.config.objectives.base import ExampleSource, Mode
from t5x_like.config.objectives.supervised import PairObjective


@config_dataclass
class Preference(PairObjective):
    """Direct preference optimization (DPO; Rafailov et al. 2023) on triples of a prompt and two answers.

    The loss of a pair is -log sigmoid(h), where h = beta * ((log p(chosen) - log p_ref(chosen)) - (log p(rejected) -
    log p_ref(rejected))), log p is the sum over the tokens of an answer given the prompt, and p_ref is the model that
    the run starts from. The examples come from a corpus with `rejected_field`. The prompt is laid out as the inputs of
    `Supervised`. It is never cut; an answer that is longer than its row is, and then ends without EOS.
    """

    example_source: ClassVar[ExampleSource] = "preferences"

    kind: Literal["preference"] = "preference"
    name: str = "dpo"
    rate: float = 1.0
    mode: Mode | None = None
    beta: PositiveFloat = 0.1
    """Strength with which the model is held at the reference: a larger value allows smaller changes."""
    label_smoothing: Annotated[float, pydantic.Field(ge=0, lt=0.5)] = 0.0
    """Assumed probability e that the two answers of a pair are exchanged (conservative DPO; Mitchell 2023): the loss is
    -(1 - e) log sigmoid(h) - e log sigmoid(-h)."""
    pairs_per_row: PositiveInt = 1
    """Largest number of pairs that share a row in training, as segments of it: those that fit are packed by first fit.
    The mean over pairs does not depend on it."""
    dialogues: bool = False
    """The pairs are dialogues in a single stream (`CorpusConfig.messages_field`): prompt and answers are what the chat
    template writes, and no EOS is added to them. With an encoder, dialogues are ordinary prompts and answers."""

    @property
    def description(self) -> str:
        return f"beta {self.beta:g}"

    def expected_loss_tokens(self, raw_length: int) -> float:
        """Return 1: the loss is a mean over pairs."""
        return 1.0
