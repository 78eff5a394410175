"""Scaling law: the compute-optimal model size and number of tokens for a budget of FLOPs, by the Chinchilla fit.

The loss of a model with N parameters trained on D tokens is fitted as L(N, D) = E + A / N**alpha + B / D**beta. A
budget of C = 6 N D FLOPs gives the smallest loss at N = G (C / 6)**(beta / (alpha + beta)) and D = (C / 6)**(alpha /
(alpha + beta)) / G, with G = (alpha A / (beta B))**(1 / (alpha + beta)).

HOFFMANN is the fit as published (Hoffmann et al. 2022, arXiv 2203.15556, approach 3, rounded constants). It contradicts
the paper's own 70B model on 1.4T tokens. BESIROGLU is a new fit of the same data (Besiroglu et al. 2024, arXiv
2404.10102), which agrees with that model; the advice of this package follows it.
"""

from __future__ import annotations

import dataclasses

CAVEAT = (
    "The fit is of decoders on MassiveText with its tokenizer. The optimal size carries over as a rule of thumb; the "
    "loss itself does not: never compare it with the loss on another corpus, tokenizer or objective."
)


@dataclasses.dataclass(frozen=True)
class ScalingFit:
    """Fitted loss L(N, D) = e + a / N**alpha + b / D**beta, in nats per token."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float
    source: str

    def loss(self, parameters: float, tokens: float) -> float:
        return self.e + self.a / parameters**self.alpha + self.b / tokens**self.beta


HOFFMANN = ScalingFit(1.69, 406.4, 410.7, 0.34, 0.28, "Hoffmann et al. 2022, arXiv 2203.15556, approach 3")
BESIROGLU = ScalingFit(1.8172, 482.01, 2085.43, 0.3478, 0.3658, "Besiroglu et al. 2024, arXiv 2404.10102")


@dataclasses.dataclass(frozen=True)
class ComputeOptimum:
    """Compute-optimal use of a budget.

    Attributes:
      parameters: Number of parameters N.
      tokens: Number of tokens D.
      loss: Loss predicted by the fit, in nats per token.
      source: Source of the fit.
    """

    parameters: float
    tokens: float
    loss: float
    source: str

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / self.parameters


def compute_optimal(flops: float, fit: ScalingFit = BESIROGLU) -> ComputeOptimum:
    """Return the optimal model size and number of tokens for a number of training FLOPs.

    Raises:
      ValueError: The number of FLOPs is not positive.
    """
    if flops <= 0:
        raise ValueError(f"found {flops} FLOPs, expected more than 0")
    products = flops / 6
    both = fit.alpha + fit.beta
    scale = (fit.alpha * fit.a / (fit.beta * fit.b)) ** (1 / both)
    parameters = scale * products ** (fit.beta / both)
    tokens = products ** (fit.alpha / both) / scale
    return ComputeOptimum(parameters, tokens, fit.loss(parameters, tokens), fit.source)


def tokens_for(parameters: float, fit: ScalingFit = BESIROGLU) -> float:
    """Return the number of tokens for which a model of this size is compute-optimal.

    At the optimum alpha A / N**alpha = beta B / D**beta; this is solved for D.
    """
    return (fit.beta * fit.b / (fit.alpha * fit.a) * parameters**fit.alpha) ** (1 / fit.beta)
