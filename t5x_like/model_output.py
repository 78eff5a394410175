"""Output of a model for the training and evaluation step: logits, and auxiliary losses and metrics.

This is the only interface between models and the loss. A model with one head returns its logits and nothing else. A
router, a discriminator or another head adds the losses that train it to `ModelOutput.losses`; the step does not need to
know what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from t5x_like.monitoring.metrics import WeightedMean

TOKENS_PER_EXPERT = "moe/tokens_per_expert/"
"""Beginning of the name of the statistic that moves the biases of routers; the name of the stack follows. Its sum is
float32 [layers, experts]. Training and evaluation steps remove it from their metrics."""


class AuxiliaryLoss(NamedTuple):
    """A loss beside the cross-entropy of the logits, given as a sum.

    The training loss is the batch's mean cross-entropy plus, for each auxiliary loss, coefficient * sum / weight, where
    sum and weight are totals over the whole batch, that is over its sub-batches and accumulation parts.

    Attributes:
      sum: float32 scalar, differentiable.
      weight: float32 scalar that divides the sum (mostly a number of tokens). It depends on the batch and on no
        parameter.
      coefficient: Factor of the mean. The cross-entropy has 1. A statistic has 0, and no gradient.
    """

    sum: Any
    weight: Any
    coefficient: float


class Targets(NamedTuple):
    """Targets of the logits.

    Attributes:
      ids: int [rows, length], target token ids.
      weights: float32 [rows, length], loss weights.
    """

    ids: Any
    weights: Any


class OutputProjection(NamedTuple):
    """Factors of the logits: softcap * tanh((states @ kernel + bias) / softcap).

    Attributes:
      states: float [rows, length, d].
      kernel: float [d, vocabulary and its padding].
      bias: float [vocabulary and its padding]; None: no bias.
      softcap: Soft cap; None: the logits are states @ kernel + bias.
      vocab_size: Number of token ids. Further columns of the kernel are padding, for which there are no logits. None:
        the kernel has no padding.
    """

    states: Any
    kernel: Any
    bias: Any = None
    softcap: float | None = None
    vocab_size: int | None = None

    @property
    def is_padded(self) -> bool:
        return self.vocab_size is not None and self.vocab_size < self.kernel.shape[1]


class ModelOutput(NamedTuple):
    """Results of a model for a sub-batch.

    Attributes:
      logits: float32 [rows, length, vocabulary], for the batch's targets; or None.
      losses: Name -> auxiliary loss; each is reported under its name as a mean without the coefficient. Without logits,
        "loss" must be one of them, and the others are added to it.
      metrics: Name -> metric that is reported and not minimized.
      targets: Targets of the logits if these are not the batch's own target tokens.
      loss_coefficient: Factor of the cross-entropy of the logits in the training loss; it is reported without it.
      projection: Factors of these logits, so that a loss can be computed from a part of them at a time; XLA removes
        logits that nothing reads. None: the logits are no such product, or something else reads them.
    """

    logits: Any
    losses: Mapping[str, AuxiliaryLoss] = {}
    metrics: Mapping[str, WeightedMean] = {}
    targets: Targets | None = None
    loss_coefficient: float = 1.0
    projection: OutputProjection | None = None
