"""Feature converters: inputs and targets become model features, with seqio's names and semantics.

The results equal those of seqio's EncDec, PrefixLM, LM and Encoder feature converters with and without packing; a test
compares them. In seqio id 0 is the pad id and also the first token that the decoder reads, as it is here by default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, assert_never

import numpy as np
import numpy.typing as npt

from t5x_like.config.batch_spec import RowShape
from t5x_like.config.objectives import Layout
from t5x_like.data.objectives.examples import Examples, Tokens
from t5x_like.data.tokenizers.vocabulary import EOS_ID, PAD_ID, Vocabulary

Features = dict[str, npt.NDArray[Any]]

NO_DENOISER = -1
"""`denoiser_ids` of token positions that are padding."""


@dataclasses.dataclass(frozen=True)
class RowIds:
    """Ids that rows have beside those of their examples.

    Attributes:
      pad: Id of padding. It is not found in a packed row, whose segment ids say what is padding.
      start: Id that a decoder reads first.
      eos: Id at the end of a document.
    """

    pad: int = PAD_ID
    start: int = PAD_ID
    eos: int = EOS_ID

    @staticmethod
    def of(vocabulary: Vocabulary) -> RowIds:
        return RowIds(vocabulary.pad_id, vocabulary.start_id, vocabulary.eos_id)


def convert(
    examples: Examples, layout: Layout, inputs_length: int, targets_length: int, ids: RowIds = RowIds()
) -> Features:
    """Return model features, each [rows, length]; `config.batch_spec.sub_batch_spec` lists those of a layout.

    They are int32; the loss weights are float32 if the examples have weights (`scored_weight_N`).

    Raises:
      ValueError: an example is longer than its row. The lengths of windows exclude this.
    """
    # The converters write 0 for padding and for the first decoder input, as seqio does. A vocabulary with other ids is
    # served by overwriting these positions; the lengths find them, because 0 can be an ordinary token of such a
    # vocabulary.
    features = _CONVERTERS[layout](examples, inputs_length, targets_length)
    if ids != RowIds():
        for stack, lengths_N in stack_lengths(examples, layout).items():
            for name in features.keys() & {f"{stack}_input_tokens", f"{stack}_target_tokens"}:
                tokens = np.array(features[name])
                tokens[np.arange(tokens.shape[1]) >= lengths_N[:, None]] = ids.pad
                if name == "decoder_input_tokens":
                    tokens[:, 0] = ids.start
                features[name] = tokens
    return features


def with_document_borders(features: Features, examples: Examples, layout: Layout, ids: RowIds = RowIds()) -> Features:
    """Return features of windows with a segment for each document, whose positions restart.

    An EOS belongs to the document that it ends; the token after it begins the next. A decoder's input at the beginning
    of a document is its start id, as that of a packed document.

    Args:
      features: Features of `convert` for an objective whose targets are the text.
      examples: The examples that they were made from.
      layout: causal_lm or encoder.
      ids: Ids beside those of the examples.
    """
    ((stack, lengths_N),) = stack_lengths(examples, layout).items()
    targets_NxL = features[f"{stack}_target_tokens"]
    position_L = np.arange(targets_NxL.shape[1])
    # The first column stays True: a window that begins inside a document counts as the beginning of one, because the
    # tokens before it are not in the row.
    is_first_NxL = np.ones(targets_NxL.shape, np.bool_)
    is_first_NxL[:, 1:] = targets_NxL[:, :-1] == ids.eos
    present_NxL = position_L < lengths_N[:, None]
    # Index of the newest document start at or before each position: indices increase, so the running maximum keeps the
    # last.
    start_NxL = np.maximum.accumulate(np.where(is_first_NxL, position_L, 0), axis=1)
    segments_NxL = np.where(present_NxL, np.cumsum(is_first_NxL, axis=1), 0)
    positions_NxL = np.where(present_NxL, position_L - start_NxL, 0)
    inputs_NxL = features[f"{stack}_input_tokens"]
    if layout == "causal_lm":
        inputs_NxL = np.where(is_first_NxL, ids.start, inputs_NxL)
    return {
        **features,
        f"{stack}_input_tokens": inputs_NxL.astype(np.int32),
        f"{stack}_segment_ids": segments_NxL.astype(np.int32),
        f"{stack}_positions": positions_NxL.astype(np.int32),
    }


def put_rows(
    out: Features,
    row_n: npt.NDArray[np.int64],
    examples: Examples,
    layout: Layout,
    shape: RowShape,
    objective: int,
    ids: RowIds = RowIds(),
    *,
    mask_borders: bool = False,
) -> None:
    """Write examples of one objective into rows of `out`, one example per row; see `with_document_borders`."""
    features = convert(examples, layout, shape.inputs_length, shape.targets_length, ids)
    if mask_borders:
        features = with_document_borders(features, examples, layout, ids)
    for name, values in features.items():
        out[name][row_n] = values
    # The loss is reported by denoiser. One id per row is enough as long as a row has one example.
    if not shape.packed:
        out["denoiser_ids"][row_n] = objective
        return
    if mask_borders:
        (segments_nxL,) = (values for name, values in features.items() if name.endswith("_segment_ids"))
        out["denoiser_ids"][row_n] = np.where(segments_nxL > 0, objective, NO_DENOISER)
        return
    for stack, lengths_n in stack_lengths(examples, layout).items():
        position_L = np.arange(out[f"{stack}_segment_ids"].shape[1])
        present_nxL = position_L < lengths_n[:, None]
        out[f"{stack}_segment_ids"][row_n] = present_nxL
        out[f"{stack}_positions"][row_n] = np.where(present_nxL, position_L, 0)
    # The last stack has the targets, whose positions the denoiser ids follow.
    out["denoiser_ids"][row_n] = np.where(present_nxL, objective, NO_DENOISER)


def put_packed(
    out: Features,
    row_n: npt.NDArray[np.int64],
    segment_n: npt.NDArray[np.int64],
    offsets: Mapping[str, npt.NDArray[np.int64]],
    examples: Examples,
    layout: Layout,
    objective: int,
    ids: RowIds = RowIds(),
) -> None:
    """Write n examples of one objective into packed rows, beside examples that are there already.

    Args:
      out: Features of packed rows, 0 at positions that are not written yet.
      row_n: Row of each example.
      segment_n: Number of its segment, from 1.
      offsets: For "encoder" and "decoder", if the layout has them, [n]: first token position of each example.
      examples: Inputs and targets.
      layout: Layout of the features.
      objective: Index of the objective.
      ids: Ids beside those of the examples.

    Raises:
      ValueError: an example does not fit its row.
    """
    widths = examples.inputs_NxI.shape[1], examples.targets_NxT.shape[1]
    # Rows of their own first, without padding to the row length; their tokens are then copied to their places.
    inputs_length, targets_length = (max(widths), 0) if layout == "encoder" else widths
    features = convert(examples, layout, inputs_length, targets_length, ids)
    for stack, lengths_n in stack_lengths(examples, layout).items():
        length = out[f"{stack}_segment_ids"].shape[1]
        if (offsets[stack] + lengths_n > length).any():
            raise ValueError(f"{stack}: an example ends after the last of {length} token positions")
        # One entry per token: its example, its position in the example, and its index in the flattened [rows, length].
        position_m = ranges(lengths_n)
        owner_m = np.repeat(np.arange(len(lengths_n)), lengths_n)
        flat_index_m = row_n[owner_m] * length + offsets[stack][owner_m] + position_m
        for name, values in features.items():
            if name.startswith(stack):
                # `ravel` of a contiguous array is a view, so this writes into `out`. One flat index is faster than a
                # pair of indices.
                out[name].ravel()[flat_index_m] = values[owner_m, position_m]
        out[f"{stack}_segment_ids"].ravel()[flat_index_m] = segment_n[owner_m]
        out[f"{stack}_positions"].ravel()[flat_index_m] = position_m
    # The last stack has the targets, whose positions the denoiser ids follow.
    out["denoiser_ids"].ravel()[flat_index_m] = objective


def ranges(lengths_n: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the concatenation of arange(length) for each length."""
    return np.arange(lengths_n.sum()) - np.repeat(np.cumsum(lengths_n) - lengths_n, lengths_n)


def stack_lengths(examples: Examples, layout: Layout) -> dict[str, npt.NDArray[np.int64]]:
    """Return the token positions of each example by stack. The stack with the targets comes last."""
    match layout:
        case "encoder":
            return {"encoder": examples.input_lengths_N}
        case "encoder_decoder":
            return {"encoder": examples.input_lengths_N, "decoder": examples.target_lengths_N}
        case "prefix_lm" | "causal_lm":
            if examples.aligned:
                return {"decoder": examples.target_lengths_N}
            return {"decoder": examples.input_lengths_N + examples.target_lengths_N}
        case unknown:
            assert_never(unknown)


def offsets_in_groups(lengths_n: npt.NDArray[np.int64], group_n: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return [n]: the start of each example within its group if the examples of a group follow each other.

    `group_n` is sorted.
    """
    starts_n = np.cumsum(lengths_n) - lengths_n
    # `searchsorted` finds the first example of each group, whose start is subtracted.
    return starts_n - starts_n[np.searchsorted(group_n, group_n)]


def shift_right(tokens_NxL: Tokens) -> Tokens:
    """Return the input of an autoregressive decoder: the targets shifted right by one position, with 0 in front."""
    # The last target is never read: it has no successor to predict within the row.
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


def _weights(examples: Examples, length: int) -> Tokens | npt.NDArray[np.float32]:
    """Return [N, length]: the loss weights of target positions, int32, or float32 if the examples have weights."""
    scored_NxT = np.arange(length) < examples.target_lengths_N[:, None]
    if examples.scored_NxT is not None:
        width = min(length, examples.scored_NxT.shape[1])
        scored_NxT[:, :width] &= examples.scored_NxT[:, :width]
    if examples.scored_weight_N is None:
        return scored_NxT.astype(np.int32)
    return np.where(scored_NxT, examples.scored_weight_N[:, None], 0.0).astype(np.float32)


def _encoder_decoder(examples: Examples, inputs_length: int, targets_length: int) -> Features:
    targets_NxT = _padded(examples.targets_NxT, targets_length)
    features = {
        "encoder_input_tokens": _padded(examples.inputs_NxI, inputs_length),
        "decoder_input_tokens": shift_right(targets_NxT),
        "decoder_target_tokens": targets_NxT,
        "decoder_loss_weights": _weights(examples, targets_length),
    }
    if examples.masked_targets_NxT is None:
        return features
    present_NxT = np.arange(targets_length) < examples.target_lengths_N[:, None]
    return {
        **features,
        "decoder_input_tokens": _padded(examples.masked_targets_NxT, targets_length),
        "decoder_causal_attention": present_NxT.astype(np.int32),
    }


def _causal_lm(examples: Examples, inputs_length: int, targets_length: int) -> Features:
    """Make a single stream: inputs followed by targets. Only targets are scored, and attention is causal everywhere."""
    length = inputs_length + targets_length
    input_lengths_N, target_lengths_N = examples.input_lengths_N, examples.target_lengths_N
    total_N = input_lengths_N + target_lengths_N
    if (total_N > length).any():
        raise ValueError(f"an example of {int(total_N.max())} tokens does not fit a row of {length}")
    position_L = np.arange(length)
    is_input_NxL = position_L < input_lengths_N[:, None]
    # Targets begin directly after the inputs of each row, not at `inputs_length`, so that padding is at the end only.
    is_target_NxL = ~is_input_NxL & (position_L < total_N[:, None])
    has_target_NxT = np.arange(examples.targets_NxT.shape[1]) < target_lengths_N[:, None]
    has_input_NxI = np.arange(examples.inputs_NxI.shape[1]) < input_lengths_N[:, None]

    # Boolean indexing runs through both sides row by row, so the k-th selected token goes to the k-th selected
    # position.
    row_NxL = np.full((len(input_lengths_N), length), PAD_ID, np.int32)
    row_NxL[is_input_NxL] = examples.inputs_NxI[has_input_NxI]
    row_NxL[is_target_NxL] = examples.targets_NxT[has_target_NxT]
    weights_NxT = _weights(examples, examples.targets_NxT.shape[1])
    weights_NxL = np.zeros(row_NxL.shape, weights_NxT.dtype)
    # Input positions keep weight 0: they are read, not predicted.
    weights_NxL[is_target_NxL] = weights_NxT[has_target_NxT]
    return {
        "decoder_input_tokens": shift_right(row_NxL),
        "decoder_target_tokens": row_NxL,
        "decoder_loss_weights": weights_NxL,
    }


def _prefix_lm(examples: Examples, inputs_length: int, targets_length: int) -> Features:
    """Make a single stream with bidirectional attention over the inputs and one position more (seqio's rule).

    The decoder reads its targets shifted by one, so the position that reads the last input predicts the first target.
    """
    if examples.aligned:
        return _masked_next_token(examples, inputs_length + targets_length)
    features = _causal_lm(examples, inputs_length, targets_length)
    position_L = np.arange(inputs_length + targets_length)
    bidirectional_NxL = position_L < (examples.input_lengths_N + 1)[:, None]
    present_NxL = position_L < (examples.input_lengths_N + examples.target_lengths_N)[:, None]
    return {**features, "decoder_causal_attention": (bidirectional_NxL & present_NxL).astype(np.int32)}


def _masked_next_token(examples: Examples, length: int) -> Features:
    """Make a single stream for the masked LM of GPT-BERT: masked next-token prediction.

    The decoder reads the masked text shifted by one and attends to all of it, so each position predicts the token after
    the one that it reads, as in causal LM.
    """
    # The shift puts the last input one position beyond the text; `present_NxL` cuts it off, so that padding stays
    # padding.
    present_NxL = np.arange(length) < examples.target_lengths_N[:, None]
    return {
        "decoder_input_tokens": np.where(present_NxL, shift_right(_padded(examples.inputs_NxI, length)), PAD_ID),
        "decoder_target_tokens": _padded(examples.targets_NxT, length),
        "decoder_loss_weights": _weights(examples, length),
        "decoder_causal_attention": present_NxL.astype(np.int32),
    }


def _encoder(examples: Examples, inputs_length: int, targets_length: int) -> Features:
    """Make aligned inputs and targets.

    seqio scores the positions whose input is the mask token. Here all selected positions are scored, including those
    with a random or unchanged token.
    """
    del targets_length
    return {
        "encoder_input_tokens": _padded(examples.inputs_NxI, inputs_length),
        "encoder_target_tokens": _padded(examples.targets_NxT, inputs_length),
        "encoder_loss_weights": _weights(examples, inputs_length),
    }


_CONVERTERS: dict[Layout, Callable[[Examples, int, int], Features]] = {
    "encoder_decoder": _encoder_decoder,
    "prefix_lm": _prefix_lm,
    "causal_lm": _causal_lm,
    "encoder": _encoder,
}
