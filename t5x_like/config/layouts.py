"""Layouts: how inputs and targets become the rows of a model's stacks.

Everything that depends on the layout alone is decided here, so that a new layout is an error in each of these functions
until it is added to them.
"""

from __future__ import annotations

from typing import Literal, assert_never

from t5x_like.config.model import Architecture

Layout = Literal["encoder_decoder", "prefix_lm", "causal_lm", "encoder"]
StackName = Literal["encoder", "decoder"]


def architecture_of(layout: Layout) -> Architecture:
    """Return the architecture of the models that read this layout."""
    match layout:
        case "encoder_decoder":
            return "encoder_decoder"
        case "prefix_lm" | "causal_lm":
            return "decoder"
        case "encoder":
            return "encoder"
        case unknown:
            assert_never(unknown)


def row_positions(layout: Layout, inputs_length: int, targets_length: int) -> dict[StackName, int]:
    """Return the token positions of a row by stack. The last stack has the targets.

    A decoder alone reads inputs and targets one after the other, whatever the length of each. An encoder predicts
    tokens at the positions of its inputs.
    """
    match layout:
        case "encoder_decoder":
            return {"encoder": inputs_length, "decoder": targets_length}
        case "prefix_lm" | "causal_lm":
            return {"decoder": inputs_length + targets_length}
        case "encoder":
            return {"encoder": inputs_length}
        case unknown:
            assert_never(unknown)


def has_bidirectional_prefix(layout: Layout) -> bool:
    """Return True if a decoder attends to its inputs in both directions: `decoder_causal_attention` is a feature."""
    match layout:
        case "prefix_lm":
            return True
        case "encoder_decoder" | "causal_lm" | "encoder":
            return False
        case unknown:
            assert_never(unknown)
