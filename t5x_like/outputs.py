"""What a model hands to the step: logits, and further losses and metrics of its own.

This is the only door between models and the loss. A model with one head returns its logits and nothing else. What a
router, a discriminator or another head wants trained goes through `Output.losses`; the step need not know what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from t5x_like.monitoring.metrics import Mean


class Loss(NamedTuple):
    """A loss beside the cross-entropy of the logits, as a sum.

    What is minimised is the batch's mean cross-entropy and, for each of these, coefficient * sum / weight, with sum and
    weight those of the whole batch, over its sub-batches and accumulation parts.

    Attributes:
      sum: float32 scalar, to be differentiated.
      weight: float32 scalar, what the sum is divided by (a number of tokens, mostly). It depends on the batch and on
        no parameter.
      coefficient: Of the mean. The cross-entropy's is 1.
    """

    sum: Any
    weight: Any
    coefficient: float


class Targets(NamedTuple):
    """What the logits are to say.

    Attributes:
      ids: int [rows, length], numbers of logits.
      weights: float32 [rows, length], loss weights.
    """

    ids: Any
    weights: Any


class Output(NamedTuple):
    """A model's results for a sub-batch.

    Attributes:
      logits: float32 [rows, length, vocabulary], of the batch's targets; or None.
      losses: By the name under which each is reported, as its mean without the coefficient. Without logits, "loss" is
        one of them, and what the others are added to.
      metrics: What is reported and not minimised.
      targets: Of the logits, where these are not the batch's own target tokens.
    """

    logits: Any
    losses: Mapping[str, Loss] = {}
    metrics: Mapping[str, Mean] = {}
    targets: Targets | None = None
