"""What all families' readers and writers of config.json share."""

from __future__ import annotations

import dataclasses
from typing import Any

from t5x_like.config.model import Activation
from t5x_like.interop.huggingface.fields import ACTIVATIONS

Values = dict[str, Any]
TIED_LM: dict[str, Any] = {"tie_embeddings": True, "embedding_stddev": 0.02}


@dataclasses.dataclass(frozen=True)
class Present:
    """What of a model the files hold, as far as config.json does not say.

    Attributes:
      head: A head of its own: with other numbers than the token table where both are there.
      masked_lm: The layers of a head over the vocabulary of an encoder.
    """

    head: bool = False
    masked_lm: bool = True


def activation_name(activation: Activation, *, tanh: str = "gelu_pytorch_tanh") -> str:
    if activation == "gelu_tanh":
        return tanh
    return next(name for name, own in ACTIVATIONS.items() if own == activation)
