"""The shape of a batch: the only thing that data and model have to agree on.

A step's batch is a dict of sub-batches by name, each a dict of features under seqio's names. All sub-batches of a step
add to one loss. Most runs have one sub-batch, "main"; planning and tests fabricate batches from the specification.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from t5x_like.config.data import DataConfig
from t5x_like.config.lengths import raw_window_length, row_lengths, windows_per_row
from t5x_like.config.objectives import Labelled, Objective
from t5x_like.config.rates import pattern, phases
from t5x_like.config.run import RunConfig

MAIN = "main"


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    shape: tuple[int, ...]
    dtype: str


BatchSpec = Mapping[str, Mapping[str, ArraySpec]]
"""Sub-batch name -> feature name -> shape and dtype; the first dimension is the number of rows."""


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Rows of one sub-batch.

    Attributes:
      packed: Rows can hold several examples: they have segment ids and positions.
    """

    inputs_length: int
    targets_length: int
    packed: bool


def sub_batch_of(objective: Objective, data: DataConfig) -> str:
    """Name of the sub-batch that the rows of this objective are in."""
    if data.layout != "encoder_decoder":
        return MAIN
    window = raw_window_length(objective, data.layout, data.inputs_length, data.targets_length)
    needed = row_lengths(objective, window).targets
    fitting = [length for length in data.short_targets_lengths if needed <= length < data.targets_length]
    return f"targets_{min(fitting)}" if fitting else MAIN


def row_shapes(data: DataConfig) -> dict[str, RowShape]:
    """The sub-batches that the data's objectives need, "main" first, by name."""
    if data.seqio is not None:
        return {MAIN: RowShape(data.inputs_length, data.targets_length, packed=data.seqio.pack)}
    documents = any(data.examples_of(share) == "documents" for share in data.sources)
    paired = {sub_batch_of(objective, data) for objective in data.objectives if windows_per_row(objective) > 1}
    lengths = {MAIN: data.targets_length}
    lengths |= {f"targets_{length}": length for length in sorted(data.short_targets_lengths, reverse=True)}
    used = {MAIN} if documents else {sub_batch_of(objective, data) for objective in data.objectives}
    return {
        name: RowShape(data.inputs_length, length, packed=documents or name in paired)
        for name, length in lengths.items()
        if name in used
    }


def sub_batch_slots(data: DataConfig) -> list[dict[str, int]]:
    """For each phase of the mixture, the rows of a superblock by sub-batch."""
    shapes = row_shapes(data)
    if len(shapes) == 1:
        return [dict.fromkeys(shapes, 1) for _ in phases(data)]
    found = []
    for phase in phases(data):
        counts = dict.fromkeys(shapes, 0)
        for objective, count in zip(data.mixture, pattern(data.mixture, data, phase.objectives), strict=True):
            counts[sub_batch_of(objective, data)] += count
        found.append(counts)
    return found


def rows_per_sub_batch(data: DataConfig, batch_size: int) -> dict[str, int]:
    """Rows of a step by sub-batch. `batch_size` must be one that `validate` lets pass."""
    counts = sub_batch_slots(data)[0]
    return {name: batch_size * count // sum(counts.values()) for name, count in counts.items()}


def batch_spec(run: RunConfig) -> BatchSpec:
    """The global batch that `run` trains on: for each sub-batch the features of `sub_batch_spec`."""
    shapes = row_shapes(run.data)
    rows = rows_per_sub_batch(run.data, run.training.batch_size)
    return {name: sub_batch_spec(run.data, shape, rows[name]) for name, shape in shapes.items()}


def evaluation_spec(run: RunConfig) -> BatchSpec:
    """The global batch that `run` is evaluated on: as many rows of the full lengths, one example each."""
    shape = RowShape(run.data.inputs_length, run.data.targets_length, packed=False)
    return {MAIN: sub_batch_spec(run.data, shape, run.training.batch_size)}


def sub_batch_spec(data: DataConfig, shape: RowShape, rows: int) -> Mapping[str, ArraySpec]:
    """Features of a sub-batch by layout, all int32 of [rows, length].

    encoder_decoder: encoder_input_tokens, decoder_input_tokens, decoder_target_tokens, decoder_loss_weights.
    prefix_lm: decoder_input_tokens, decoder_target_tokens, decoder_loss_weights, decoder_causal_attention (1 where
      attention is bidirectional: the inputs and one position more, seqio's rule).
    causal_lm: the same without decoder_causal_attention.
    encoder: encoder_input_tokens, encoder_target_tokens, encoder_loss_weights.
    Packed rows also have encoder_segment_ids, encoder_positions, decoder_segment_ids and decoder_positions, as far as
    there is an encoder and a decoder.
    Labelled examples have the input tokens alone (prefix_lm: decoder_causal_attention, 1 for all of the text), `labels`
    and `label_weights`: [rows], or of token classification [rows, length]; labels are float32 for regression. For
    embeddings there are `positive_input_tokens` in the place of labels.
    `denoiser_ids`, an index into `data.objectives`: [rows], or where rows are packed [rows, length], by target cell;
    not of seqio's Tasks.
    """
    encoder = (rows, shape.inputs_length)
    is_single = data.layout in ("prefix_lm", "causal_lm")
    decoder = (rows, shape.inputs_length + shape.targets_length if is_single else shape.targets_length)
    features: dict[str, tuple[int, ...]] = {}
    if data.layout in ("encoder_decoder", "encoder"):
        features["encoder_input_tokens"] = encoder
        if shape.packed:
            features |= {"encoder_segment_ids": encoder, "encoder_positions": encoder}
    if data.layout == "encoder":
        features |= {"encoder_target_tokens": encoder, "encoder_loss_weights": encoder}
    else:
        names = ("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights")
        features |= dict.fromkeys(names, decoder)
        if data.layout == "prefix_lm":
            features["decoder_causal_attention"] = decoder
        if shape.packed:
            features |= {"decoder_segment_ids": decoder, "decoder_positions": decoder}
    if data.labelled is not None:
        return _labelled_spec(data, data.labelled, rows)
    targets = encoder if data.layout == "encoder" else decoder
    if data.seqio is None:
        features["denoiser_ids"] = targets if shape.packed else (rows,)
    return {name: ArraySpec(size, "int32") for name, size in features.items()}


def _labelled_spec(data: DataConfig, objective: Labelled, rows: int) -> Mapping[str, ArraySpec]:
    cells = (rows, data.row_length)
    stack = "encoder" if data.layout == "encoder" else "decoder"
    found = {f"{stack}_input_tokens": ArraySpec(cells, "int32")}
    if data.layout == "prefix_lm":
        found["decoder_causal_attention"] = ArraySpec(cells, "int32")
    per = cells if objective.kind == "token_classification" else (rows,)
    if objective.kind == "embedding":
        found["positive_input_tokens"] = ArraySpec(cells, "int32")
    else:
        found["labels"] = ArraySpec(per, "float32" if objective.kind == "regression" else "int32")
    return {**found, "label_weights": ArraySpec(per, "int32"), "denoiser_ids": ArraySpec((rows,), "int32")}
