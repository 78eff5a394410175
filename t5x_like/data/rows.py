"""Rows of features taken apart again: into examples, and their tokens into runs of one kind."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from t5x_like.config.objectives import WITHOUT_INPUTS, BlankInfilling, MaskedLM, Objective
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.data.vocabulary import EOS_ID, PAD_ID

Ids = npt.NDArray[np.int32]
Row = Mapping[str, npt.NDArray[Any]]
Kind = Literal["given", "scored", "sentinel", "mode", "end"]


@dataclasses.dataclass(frozen=True)
class Example:
    """An example without its padding.

    Attributes:
      denoiser: Index of its objective.
      inputs, targets: Ids, as `denoise` made them. Inputs of an aligned example in a single stream lack the last, which
        the decoder never reads.
      scored: Targets that the loss is on.
      aligned: Each target is the raw token of the input in the same place (masked LM).
      seen: How the decoder of a single stream sees the inputs; "" where they are an encoder's.
    """

    denoiser: int
    inputs: Ids
    targets: Ids
    scored: npt.NDArray[np.bool_]
    aligned: bool
    seen: str = ""


def examples(row: Row, objectives: Sequence[Objective]) -> Iterator[Example]:
    """The examples of a row of features, or what its segments hold; none of a row that is all padding."""
    for segment in segments(row):
        denoiser = int(segment["denoiser_ids"].max(initial=-1))
        if denoiser >= 0:
            yield example(segment, denoiser, objectives[denoiser])


def segments(row: Row) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """The features of each example of a row: all of them, or those of each segment."""
    stacks = [stack for stack in ("encoder", "decoder") if f"{stack}_segment_ids" in row]
    if not stacks:
        yield dict(row)
        return
    ids = {stack: row[f"{stack}_segment_ids"] for stack in stacks}
    for number in range(1, max(int(numbers.max()) for numbers in ids.values()) + 1):
        found = {
            name: values[ids[stack] == number]
            for stack in stacks
            for name, values in row.items()
            if name.startswith(stack)
        }
        found["denoiser_ids"] = row["denoiser_ids"][ids[stacks[-1]] == number]
        yield found


def example(segment: Row, denoiser: int, objective: Objective) -> Example:
    """The example that a segment's features hold."""
    if "encoder_target_tokens" in segment:
        length = _length(segment["encoder_target_tokens"])
        inputs, targets = segment["encoder_input_tokens"][:length], segment["encoder_target_tokens"][:length]
        return Example(denoiser, inputs, targets, segment["encoder_loss_weights"][:length] > 0, aligned=True)
    length = _length(segment["decoder_target_tokens"])
    targets, scored = segment["decoder_target_tokens"][:length], segment["decoder_loss_weights"][:length] > 0
    if "encoder_input_tokens" in segment:
        inputs = segment["encoder_input_tokens"]
        return Example(denoiser, inputs[: _length(inputs)], targets, scored, aligned=False)
    seen = "bidirectional" if "decoder_causal_attention" in segment else "causal"
    if isinstance(objective, MaskedLM):
        inputs = segment["decoder_input_tokens"][1:length]
        return Example(denoiser, inputs, targets, scored, aligned=True, seen="one place later")
    given = int(np.argmax(scored)) if scored.any() else length
    if isinstance(objective, WITHOUT_INPUTS):
        given = 0  # CM3 may begin with a sentinel, which is not scored
    elif isinstance(objective, BlankInfilling):
        given -= 1  # the sentinel that begins the targets is not scored
    return Example(denoiser, targets[:given], targets[given:], scored[given:], aligned=False, seen=seen)


def _length(tokens: npt.NDArray[Any]) -> int:
    return int(np.flatnonzero(tokens)[-1]) + 1 if tokens.any() else 0


@dataclasses.dataclass(frozen=True)
class Run:
    """Tokens of one kind that stand together. What is no text stands for itself: one run per token.

    Attributes:
      text: As the tokenizer spells it; bytes that are no UTF-8 are U+FFFD. Not made safe for a terminal.
      number: Of a sentinel.
    """

    kind: Kind
    text: str
    number: int = 0


def runs(tokens: npt.NDArray[Any], scored: npt.NDArray[np.bool_], tokenizer: Tokenizer) -> list[Run]:
    """A stretch of tokens as runs, `scored` saying of each whether the loss is on it."""
    vocabulary = tokenizer.vocabulary
    kinds = [_kind(token, on, tokenizer) for token, on in zip(tokens.tolist(), scored.tolist(), strict=True)]
    found = []

    def joined(index: int) -> tuple[str, int]:
        return kinds[index], -1 if kinds[index] in ("scored", "given") else index

    for (_, _), group in itertools.groupby(range(len(kinds)), joined):
        places = list(group)
        first = int(tokens[places[0]])
        text = vocabulary.special_name(first)
        if text is None:
            text = tokenizer.to_bytes(tokens[places].tolist()).decode("utf-8", errors="replace")
        number = vocabulary.first_sentinel_id - first if kinds[places[0]] == "sentinel" else 0
        found.append(Run(kinds[places[0]], text, number))
    return found


def _kind(token: int, scored: bool, tokenizer: Tokenizer) -> Kind:
    vocabulary = tokenizer.vocabulary
    if token in (EOS_ID, PAD_ID):
        return "end"
    if token > vocabulary.first_sentinel_id:
        return "mode"
    if token >= vocabulary.base_size:
        return "sentinel"
    return "scored" if scored else "given"
