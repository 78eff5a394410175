"""Formulas of serving that do not depend on a model: speculative decoding, turns of a dialogue, Little's law, and where
inference costs as much as training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


def expected_tokens(acceptance: float, draft_length: int) -> float:
    """Return the mean number of tokens that one check of a draft yields: (1 - a**(g + 1)) / (1 - a).

    Each of g drafted tokens is accepted with probability a, independently; the first rejected one is drawn again, and a
    further token follows a draft that is accepted whole (Leviathan et al. 2023, arXiv 2211.17192, equation 1).
    """
    return float(sum(acceptance**accepted for accepted in range(draft_length + 1)))


def speculative_speedup(acceptance: float, draft_length: int, draft_cost: float, check_cost: float = 1.0) -> float:
    """Return the speed of speculative decoding relative to plain decoding (the same paper, theorem 3.8).

    Args:
      acceptance: Probability that a drafted token is accepted.
      draft_length: Number of tokens of a draft.
      draft_cost: Time of a step of the draft model, relative to a step of the model.
      check_cost: Time of checking a draft, relative to a step of the model: 1 where reading the weights dominates.
    """
    return expected_tokens(acceptance, draft_length) / (draft_length * draft_cost + check_cost)


@dataclasses.dataclass(frozen=True)
class BestDraft:
    """Draft length with the largest expected speed, and that speed relative to plain decoding; length 0: no draft."""

    length: int
    speedup: float


def best_draft(
    acceptance: float, draft_cost: float, check_cost: Callable[[int], float] = lambda _: 1.0, most: int = 64
) -> BestDraft:
    """Return the best draft length of 0 to `most`; `check_cost` is a function of the draft length."""
    found = [BestDraft(0, 1.0)]
    for length in range(1, most + 1):
        found.append(BestDraft(length, speculative_speedup(acceptance, length, draft_cost, check_cost(length))))
    return max(found, key=lambda best: best.speedup)


@dataclasses.dataclass(frozen=True)
class DialogueTokens:
    """Tokens that are read in a dialogue of several turns.

    Attributes:
      cached: With a cache of all earlier turns, as a causal decoder keeps it: each prompt once.
      read_again: Without one, as an encoder or a bidirectional prefix needs it: at each turn the whole dialogue so far.
    """

    cached: int
    read_again: int


def dialogue_tokens(turns: int, prompt: int, answer: int) -> DialogueTokens:
    """Return the tokens that are read in `turns` turns of a prompt and an answer each."""
    histories = [turn * (prompt + answer) for turn in range(turns)]
    return DialogueTokens(turns * prompt, sum(history + prompt for history in histories))


def implied_tokens_per_second(rows: int, answer: int, seconds: float) -> float:
    """Return the throughput of `rows` rows in flight that each get `answer` tokens after `seconds` (Little's law)."""
    return rows * answer / seconds


def break_even_tokens(training_tokens: float, inference_utilization: float = 1.0) -> float:
    """Return the tokens that are served with the FLOPs of a training on `training_tokens`: 6 N D = 2 N T, T = 3 D.

    Args:
      training_tokens: Tokens D of the training.
      inference_utilization: Utilization of inference relative to that of training: a lower one reaches the time, and
        the price, of the training with fewer tokens.
    """
    return 3 * training_tokens * inference_utilization


def layers_of_size(parameters: float, aspect: float) -> float:
    """Return L of 12 L d**2 = `parameters` with d = `aspect` L: (P / (12 r**2))**(1 / 3)."""
    return float((parameters / (12 * aspect**2)) ** (1 / 3))


def layers_by_the_short_formula(parameters: float) -> int:
    """Return the layers of a formula that is often copied: d = int((P / 12)**0.5) * 2 and L = int(P / (12 d**2)).

    It is 0 for every P, because 12 d**2 is 4 P.
    """
    width = int((parameters / 12) ** 0.5) * 2
    return int(parameters / (12 * width**2))
