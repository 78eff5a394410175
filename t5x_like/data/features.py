"""Inputs and targets become model features, under seqio's names and with seqio's semantics.

Equal to seqio's EncDec, PrefixLM, LM and Encoder feature converters with and without packing (a test compares with the
real ones). Id 0 is the pad id and also what the decoder reads before its first token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from t5x_like.config.batch import RowShape
from t5x_like.config.objectives import Layout
from t5x_like.data.denoise import Examples, Mask, Tokens
from t5x_like.data.vocabulary import PAD_ID

Features = dict[str, Tokens]

NO_DENOISER = -1
"""`denoiser_ids` of cells that are padding."""


def convert(examples: Examples, layout: Layout, inputs_length: int, targets_length: int) -> Features:
    """Model features, each int32 of [rows, length]; see `config.batch.batch_spec` for which layout has which.

    Raises:
      ValueError: an example is longer than its row. Windows are sized so that this cannot happen.
    """
    return _CONVERTERS[layout](examples, inputs_length, targets_length)


def put_rows(
    out: Features, row_n: npt.NDArray[np.int64], examples: Examples, layout: Layout, shape: RowShape, objective: int
) -> None:
    """Writes examples of one objective into rows of `out` that hold nothing else."""
    features = convert(examples, layout, shape.inputs_length, shape.targets_length)
    for name, values in features.items():
        out[name][row_n] = values
    if not shape.packed:
        out["denoiser_ids"][row_n] = objective
        return
    for stack, lengths_n in stack_lengths(examples, layout).items():
        places_L = np.arange(out[f"{stack}_segment_ids"].shape[1])
        present_nxL = places_L < lengths_n[:, None]
        out[f"{stack}_segment_ids"][row_n] = present_nxL
        out[f"{stack}_positions"][row_n] = np.where(present_nxL, places_L, 0)
    out["denoiser_ids"][row_n] = np.where(present_nxL, objective, NO_DENOISER)


def put_packed(
    out: Features,
    row_n: npt.NDArray[np.int64],
    segment_n: npt.NDArray[np.int64],
    offsets: Mapping[str, npt.NDArray[np.int64]],
    examples: Examples,
    layout: Layout,
    objective: int,
) -> None:
    """Writes examples of one objective beside others into packed rows.

    Args:
      out: Features of packed rows, 0 where nothing is written yet.
      row_n, segment_n: Row of each example, and the number of its segment, from 1.
      offsets: "encoder" and "decoder", as far as there are such features: [n] first cell of each example.
    """
    widths = examples.inputs_NxI.shape[1], examples.targets_NxT.shape[1]
    features = convert(examples, layout, *((max(widths), 0) if layout == "encoder" else widths))
    for stack, lengths_n in stack_lengths(examples, layout).items():
        length = out[f"{stack}_segment_ids"].shape[1]
        if (offsets[stack] + lengths_n > length).any():
            raise ValueError(f"{stack}: examples that end behind the last of {length} cells")
        cells_m = _ranges(lengths_n)
        owner_m = np.repeat(np.arange(len(lengths_n)), lengths_n)
        into_m = row_n[owner_m] * length + offsets[stack][owner_m] + cells_m
        for name, values in features.items():
            if name.startswith(stack):
                out[name].ravel()[into_m] = values[owner_m, cells_m]
        out[f"{stack}_segment_ids"].ravel()[into_m] = segment_n[owner_m]
        out[f"{stack}_positions"].ravel()[into_m] = cells_m
    # The last stack is the one that has the targets.
    out["denoiser_ids"].ravel()[into_m] = objective


def _ranges(lengths_n: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """0, 1, ... up to each length, one after the other."""
    return np.arange(lengths_n.sum()) - np.repeat(np.cumsum(lengths_n) - lengths_n, lengths_n)


def stack_lengths(examples: Examples, layout: Layout) -> dict[str, npt.NDArray[np.int64]]:
    """Cells of each example by stack; the stack with the targets comes last."""
    if layout == "encoder":
        return {"encoder": examples.input_lengths_N}
    if layout == "encoder_decoder":
        return {"encoder": examples.input_lengths_N, "decoder": examples.target_lengths_N}
    if examples.aligned:
        return {"decoder": examples.target_lengths_N}
    return {"decoder": examples.input_lengths_N + examples.target_lengths_N}


def offsets_in_groups(lengths_n: npt.NDArray[np.int64], group_n: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where each example begins if those of a group stand one after the other. `group_n` counts up from 0."""
    ends_n = np.cumsum(lengths_n)
    return ends_n - lengths_n - (ends_n - lengths_n)[np.searchsorted(group_n, group_n)]


def shift_right(tokens_NxL: Tokens) -> Tokens:
    """What an autoregressive decoder reads: its targets one position later, 0 in front."""
    shifted_NxL = np.zeros_like(tokens_NxL)
    shifted_NxL[:, 1:] = tokens_NxL[:, :-1]
    return shifted_NxL


def _padded(tokens_NxL: Tokens, length: int) -> Tokens:
    width = tokens_NxL.shape[1]
    if width > length and (tokens_NxL[:, length:] != PAD_ID).any():
        raise ValueError(f"an example of {width} tokens does not fit a row of {length}")
    padded = np.full((len(tokens_NxL), length), PAD_ID, np.int32)
    padded[:, : min(width, length)] = tokens_NxL[:, :length]
    return padded


def _weights(examples: Examples, length: int) -> Mask:
    """[N, length] of the targets' own positions: what is scored."""
    scored_NxT = np.arange(length) < examples.target_lengths_N[:, None]
    if examples.scored_NxT is not None:
        width = min(length, examples.scored_NxT.shape[1])
        scored_NxT[:, :width] &= examples.scored_NxT[:, :width]
    return scored_NxT


def _encoder_decoder(examples: Examples, inputs_length: int, targets_length: int) -> Features:
    targets_NxT = _padded(examples.targets_NxT, targets_length)
    return {
        "encoder_input_tokens": _padded(examples.inputs_NxI, inputs_length),
        "decoder_input_tokens": shift_right(targets_NxT),
        "decoder_target_tokens": targets_NxT,
        "decoder_loss_weights": _weights(examples, targets_length).astype(np.int32),
    }


def _causal_lm(examples: Examples, inputs_length: int, targets_length: int) -> Features:
    """One stream: the inputs, then the targets, which alone are scored. Attention is causal throughout."""
    length = inputs_length + targets_length
    given_N, wanted_N = examples.input_lengths_N, examples.target_lengths_N
    if (given_N + wanted_N > length).any():
        raise ValueError(f"an example of {int((given_N + wanted_N).max())} tokens does not fit a row of {length}")
    places_L = np.arange(length)
    given_NxL = places_L < given_N[:, None]
    wanted_NxL = ~given_NxL & (places_L < (given_N + wanted_N)[:, None])
    targets_are_NxT = np.arange(examples.targets_NxT.shape[1]) < wanted_N[:, None]

    row_NxL = np.full((len(given_N), length), PAD_ID, np.int32)
    row_NxL[given_NxL] = examples.inputs_NxI[np.arange(examples.inputs_NxI.shape[1]) < given_N[:, None]]
    row_NxL[wanted_NxL] = examples.targets_NxT[targets_are_NxT]
    weights_NxL = np.zeros_like(row_NxL)
    weights_NxL[wanted_NxL] = _weights(examples, examples.targets_NxT.shape[1])[targets_are_NxT]
    return {
        "decoder_input_tokens": shift_right(row_NxL),
        "decoder_target_tokens": row_NxL,
        "decoder_loss_weights": weights_NxL,
    }


def _prefix_lm(examples: Examples, inputs_length: int, targets_length: int) -> Features:
    """The same stream; attention is bidirectional over the inputs and one position more: since the decoder reads its
    targets one position later, the position that reads the last input token predicts the first target."""
    if examples.aligned:
        return _masked_next_token(examples, inputs_length + targets_length)
    features = _causal_lm(examples, inputs_length, targets_length)
    places_L = np.arange(inputs_length + targets_length)
    bidirectional_NxL = places_L < (examples.input_lengths_N + 1)[:, None]
    present_NxL = places_L < (examples.input_lengths_N + examples.target_lengths_N)[:, None]
    return {**features, "decoder_causal_attention": (bidirectional_NxL & present_NxL).astype(np.int32)}


def _masked_next_token(examples: Examples, length: int) -> Features:
    """Masked LM in one stream (GPT-BERT): the decoder reads the masked text one position later and sees all of it, so
    that each position predicts the token after the one that it reads, as in causal LM."""
    present_NxL = np.arange(length) < examples.target_lengths_N[:, None]
    return {
        "decoder_input_tokens": np.where(present_NxL, shift_right(_padded(examples.inputs_NxI, length)), PAD_ID),
        "decoder_target_tokens": _padded(examples.targets_NxT, length),
        "decoder_loss_weights": _weights(examples, length).astype(np.int32),
        "decoder_causal_attention": present_NxL.astype(np.int32),
    }


def _encoder(examples: Examples, inputs_length: int, targets_length: int) -> Features:
    """Inputs and targets are aligned. Unlike seqio, which scores where the input is the mask token, all chosen
    positions are scored: those with a random or unchanged token too."""
    del targets_length
    return {
        "encoder_input_tokens": _padded(examples.inputs_NxI, inputs_length),
        "encoder_target_tokens": _padded(examples.targets_NxT, inputs_length),
        "encoder_loss_weights": _weights(examples, inputs_length).astype(np.int32),
    }


_CONVERTERS: dict[Layout, Callable[[Examples, int, int], Features]] = {
    "encoder_decoder": _encoder_decoder,
    "prefix_lm": _prefix_lm,
    "causal_lm": _causal_lm,
    "encoder": _encoder,
}
