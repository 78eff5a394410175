"""How large a model, on how many tokens, a budget of operations is best spent on: the Chinchilla fit.

The loss of a model of N parameters trained on D tokens is fitted as L(N, D) = E + A / N**alpha + B / D**beta, and
C = 6 N D operations buy the least of it at N = G (C / 6)**(beta / (alpha + beta)), D = (C / 6)**(alpha / (alpha +
beta)) / G, with G = (alpha A / (beta B))**(1 / (alpha + beta)).

HOFFMANN is the fit as published (Hoffmann et al. 2022, arXiv 2203.15556, approach 3, rounded constants). They
contradict the paper's own 70B model on 1.4T tokens. BESIROGLU is the same data fitted again (Besiroglu et al. 2024,
arXiv 2404.10102), which agrees with it; advice here follows that.
"""

from __future__ import annotations

import dataclasses

CAVEAT = (
    "The fit is of decoders on MassiveText with its tokenizer. Which size is best carries over as a rule of thumb, the "
    "loss itself does not: never compare it with that of another corpus, tokenizer or objective."
)


@dataclasses.dataclass(frozen=True)
class Fit:
    """L(N, D) = e + a / N**alpha + b / D**beta, in nats per token."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float
    source: str

    def loss(self, parameters: float, tokens: float) -> float:
        return self.e + self.a / parameters**self.alpha + self.b / tokens**self.beta


HOFFMANN = Fit(1.69, 406.4, 410.7, 0.34, 0.28, "Hoffmann et al. 2022, arXiv 2203.15556, approach 3")
BESIROGLU = Fit(1.8172, 482.01, 2085.43, 0.3478, 0.3658, "Besiroglu et al. 2024, arXiv 2404.10102")


@dataclasses.dataclass(frozen=True)
class Optimum:
    """What a budget is best spent on.

    Attributes:
      parameters, tokens: N and D.
      loss: By the fit.
    """

    parameters: float
    tokens: float
    loss: float
    source: str

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / self.parameters


def compute_optimal(flops: float, fit: Fit = BESIROGLU) -> Optimum:
    """The best size and number of tokens for so many training FLOPs.

    Raises:
      ValueError: no operations.
    """
    if flops <= 0:
        raise ValueError(f"found {flops} operations, expected more than 0")
    products = flops / 6
    both = fit.alpha + fit.beta
    scale = (fit.alpha * fit.a / (fit.beta * fit.b)) ** (1 / both)
    parameters = scale * products ** (fit.beta / both)
    tokens = products ** (fit.alpha / both) / scale
    return Optimum(parameters, tokens, fit.loss(parameters, tokens), fit.source)


def tokens_for(parameters: float, fit: Fit = BESIROGLU) -> float:
    """Tokens at which a model of this size is the best for its budget.

    At the optimum alpha A / N**alpha = beta B / D**beta, which is solved for D.
    """
    return (fit.beta * fit.b / (fit.alpha * fit.a) * parameters**fit.alpha) ** (1 / fit.beta)
