"""Unpacking of rows: feature rows into examples, and the tokens of an example into runs of one kind."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from t5x_like.config.batch_spec import REJECTED
from t5x_like.config.objectives import Objective
from t5x_like.data.tokenizers.tokenizer import Tokenizer
from t5x_like.data.tokenizers.vocabulary import Vocabulary

Ids = npt.NDArray[np.int32]
UnpackedRow = Mapping[str, npt.NDArray[Any]]
Kind = Literal["given", "scored", "sentinel", "mode", "end"]
Stack = Literal["encoder", "decoder"]


@dataclasses.dataclass(frozen=True)
class UnpackedExample:
    """Example without its padding.

    Attributes:
      denoiser: Index of its objective.
      inputs, targets: Ids as `denoise` made them. The inputs of an aligned example in a single stream lack the last id,
        which the decoder never reads.
      scored: True for targets with loss weight.
      aligned: True if each target is the raw token of the input at the same position (masked LM).
      seen: Attention of a single stream's decoder to the inputs; "" if the inputs are an encoder's.
    """

    denoiser: int
    inputs: Ids
    targets: Ids
    scored: npt.NDArray[np.bool_]
    aligned: bool
    seen: str = ""


def examples(row: UnpackedRow, objectives: Sequence[Objective], vocabulary: Vocabulary) -> Iterator[UnpackedExample]:
    """Yield the examples of a row of features, one per segment if it is packed. A row of padding has none."""
    for segment in segments(row):
        denoiser = int(segment["denoiser_ids"].max(initial=-1))
        if denoiser >= 0:
            yield example(segment, denoiser, objectives[denoiser], vocabulary)


def segments(row: UnpackedRow) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Yield the features of each example of a row: of each segment if the row is packed, otherwise of the row.

    A preference pair has two examples, that of the chosen answer and, after it, that of the rejected one.
    """
    rejected = {name.removeprefix(REJECTED): values for name, values in row.items() if name.startswith(f"{REJECTED}d")}
    if rejected:
        # Those of the row are at the positions of the chosen answers.
        rejected["denoiser_ids"] = np.full_like(row["denoiser_ids"], np.max(row["denoiser_ids"]))
        chosen = {name: values for name, values in row.items() if not name.startswith(REJECTED)}
        for answers in zip(segments(chosen), segments(chosen | rejected), strict=True):
            yield from answers
        return
    stacks = [stack for stack in ("encoder", "decoder") if f"{stack}_segment_ids" in row]
    if not stacks:
        yield dict(row)
        return
    ids = {stack: row[f"{stack}_segment_ids"] for stack in stacks}
    # Segment 0 is padding. A segment has the same number in both stacks.
    for number in range(1, max(int(numbers.max()) for numbers in ids.values()) + 1):
        segment = {
            name: values[ids[stack] == number]
            for stack in stacks
            for name, values in row.items()
            if name.startswith(stack)
        }
        # The denoiser ids follow the last stack, which has the targets.
        segment["denoiser_ids"] = row["denoiser_ids"][ids[stacks[-1]] == number]
        yield segment


def example(segment: UnpackedRow, denoiser: int, objective: Objective, vocabulary: Vocabulary) -> UnpackedExample:
    """Return the example of a segment's features."""
    if "encoder_target_tokens" in segment:
        length = num_tokens(segment, "encoder", vocabulary)
        inputs, targets = segment["encoder_input_tokens"][:length], segment["encoder_target_tokens"][:length]
        return UnpackedExample(denoiser, inputs, targets, segment["encoder_loss_weights"][:length] > 0, aligned=True)
    length = num_tokens(segment, "decoder", vocabulary)
    targets, scored = segment["decoder_target_tokens"][:length], segment["decoder_loss_weights"][:length] > 0
    if "encoder_input_tokens" in segment:
        inputs = segment["encoder_input_tokens"][: num_tokens(segment, "encoder", vocabulary)]
        return UnpackedExample(denoiser, inputs, targets, scored, aligned=False)
    seen = "bidirectional" if "decoder_causal_attention" in segment else "causal"
    if objective.predicts_in_place:
        # Position 0 reads the start id, so the inputs are the masked text without its last token.
        inputs = segment["decoder_input_tokens"][1:length]
        return UnpackedExample(denoiser, inputs, targets, scored, aligned=True, seen="one position later")
    # In a single stream, the inputs end at the first scored token. Without inputs, the stream may still begin with an
    # unscored token (a sentinel of CM3).
    num_inputs = 0
    if objective.has_inputs:
        first_scored = int(np.argmax(scored)) if scored.any() else length
        num_inputs = first_scored - objective.unscored_first_targets
    return UnpackedExample(
        denoiser, targets[:num_inputs], targets[num_inputs:], scored[num_inputs:], aligned=False, seen=seen
    )


def num_tokens(segment: UnpackedRow, stack: Stack, vocabulary: Vocabulary) -> int:
    """Return the number of tokens of a stack in the features of an example or of a packed row, without padding.

    Where padding has the id of EOS, the tokens do not say how many of the last ones belong to the example. Loss weights
    and attention say it for a decoder, and masked LM in an encoder fills its rows. The inputs of an encoder end in one
    EOS; an end of text directly before it is taken for padding.
    """
    if f"{stack}_segment_ids" in segment:
        return int(np.count_nonzero(segment[f"{stack}_segment_ids"]))
    # Targets where there are any: the first input of a decoder may have the id of padding.
    has_targets = f"{stack}_target_tokens" in segment
    tokens = segment[f"{stack}_target_tokens" if has_targets else f"{stack}_input_tokens"]
    present = tokens != vocabulary.pad_id
    pads_with_eos = vocabulary.pad_id == vocabulary.eos_id
    if pads_with_eos and stack == "encoder" and has_targets:
        return len(tokens)
    for name in (f"{stack}_loss_weights", f"{stack}_causal_attention"):
        if name in segment:
            present = present | (segment[name] > 0)
    positions = np.flatnonzero(present)
    length = int(positions[-1]) + 1 if len(positions) else 0
    return min(length + (pads_with_eos and stack == "encoder"), len(tokens))


@dataclasses.dataclass(frozen=True)
class TokenRun:
    """Consecutive tokens of one kind. A token that is not text is a run of its own.

    Attributes:
      kind: Kind of the tokens.
      text: Decoded text, in which invalid UTF-8 is U+FFFD. It is not made safe for a terminal.
      number: Number of a sentinel.
    """

    kind: Kind
    text: str
    number: int = 0


def runs(tokens: npt.NDArray[Any], scored: npt.NDArray[np.bool_], tokenizer: Tokenizer) -> list[TokenRun]:
    """Divide tokens into runs. `scored` is True for tokens with loss weight."""
    vocabulary = tokenizer.vocabulary
    kinds = [_kind(token, on, tokenizer) for token, on in zip(tokens.tolist(), scored.tolist(), strict=True)]
    result = []

    def group_key(index: int) -> tuple[str, int]:
        return kinds[index], -1 if kinds[index] in ("scored", "given") else index

    # Neighbours are joined if they are text of one kind. The key of any other token is its index, which is unique.
    for (_, _), group in itertools.groupby(range(len(kinds)), group_key):
        positions = list(group)
        first = int(tokens[positions[0]])
        text = vocabulary.special_name(first)
        if text is None:
            text = tokenizer.to_bytes(tokens[positions].tolist()).decode("utf-8", errors="replace")
        number = vocabulary.first_sentinel_id - first if kinds[positions[0]] == "sentinel" else 0
        result.append(TokenRun(kinds[positions[0]], text, number))
    return result


def _kind(token: int, scored: bool, tokenizer: Tokenizer) -> Kind:
    vocabulary = tokenizer.vocabulary
    if token in (vocabulary.eos_id, vocabulary.pad_id):
        return "end"
    if token > vocabulary.first_sentinel_id:
        return "mode"
    if token >= vocabulary.base_size:
        return "sentinel"
    return "scored" if scored else "given"
