"""Shape of a batch: the only interface between data and model.

The batch of a step is a dict of sub-batches by name, each a dict of features under seqio's names. All sub-batches of a
step contribute to one loss. Most runs have one sub-batch, "main". Planning and tests build batches from the
specification.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import assert_never

from t5x_like.config.data import DataConfig
from t5x_like.config.layouts import has_bidirectional_prefix, row_positions
from t5x_like.config.mixture_schedule import phases, rows_per_block
from t5x_like.config.objectives import LabeledExamples, Objective
from t5x_like.config.run import RunConfig

MAIN = "main"
REJECTED = "rejected_"
"""Prefix of the features of a preference pair's rejected answer."""
CHOSEN_REFERENCE, REJECTED_REFERENCE = "chosen_reference", "rejected_reference"
"""Features of preference pairs: log-probabilities of the two answers under the model that the run starts from."""
TEACHER_IDS, TEACHER_LOG_PROBS = "teacher_ids", "teacher_log_probs"
"""Features of distillation from a stored teacher: its most likely tokens at each target, and their log-probabilities at
the temperature of the run."""
POSITIVE = "positive_input_tokens"
"""Feature of embeddings: the text that matches the row's own."""


def negative(number: int) -> str:
    """Return the name of a feature of embeddings: hard negative 1, 2, ..."""
    return f"negative_{number}_input_tokens"


def negative_weights(number: int) -> str:
    """Return the name of the feature with the weights of a hard negative, which are 0 for rows without it."""
    return f"negative_{number}_weights"


def texts_of(features: Collection[str]) -> int:
    """Return the number of texts of a row: its own, the one that matches it, and its hard negatives."""
    return 1 + (POSITIVE in features) + sum(negative(number) in features for number in range(1, len(features) + 1))


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
    """Return the name of the sub-batch that contains the rows of this objective."""
    if len(data.row_positions) == 1:  # Sub-batches differ in the length of the decoder beside an encoder.
        return MAIN
    window = objective.raw_window_length(data.layout, data.inputs_length, data.targets_length)
    needed = objective.row_lengths(window).targets
    fitting = [length for length in data.targets_length_buckets if needed <= length < data.targets_length]
    return f"targets_{min(fitting)}" if fitting else MAIN


def row_shapes(data: DataConfig) -> dict[str, RowShape]:
    """Return the sub-batches that the data's objectives need, by name, "main" first."""
    if data.seqio is not None:
        return {MAIN: RowShape(data.inputs_length, data.targets_length, packed=data.seqio.pack)}
    documents = any(data.examples_of(share) == "documents" for share in data.sources)
    packs_pairs = data.preference is not None and data.preference.pairs_per_row > 1
    paired = {sub_batch_of(objective, data) for objective in data.objectives if objective.windows_per_row > 1}
    lengths = {MAIN: data.targets_length}
    lengths |= {f"targets_{length}": length for length in sorted(data.targets_length_buckets, reverse=True)}
    used = {MAIN} if documents else {sub_batch_of(objective, data) for objective in data.objectives}
    return {
        name: RowShape(
            data.inputs_length,
            length,
            packed=documents or packs_pairs or name in paired or data.mask_document_borders,
        )
        for name, length in lengths.items()
        if name in used
    }


def sub_batch_rows_per_block(data: DataConfig) -> list[dict[str, int]]:
    """Return for each phase of the mixture the number of rows of a block by sub-batch."""
    shapes = row_shapes(data)
    if len(shapes) == 1:
        return [dict.fromkeys(shapes, 1) for _ in phases(data)]
    found = []
    for phase in phases(data):
        counts = dict.fromkeys(shapes, 0)
        for objective, count in zip(data.mixture, rows_per_block(data.mixture, data, phase.objectives), strict=True):
            counts[sub_batch_of(objective, data)] += count
        found.append(counts)
    return found


def rows_per_sub_batch(data: DataConfig, batch_size: int) -> dict[str, int]:
    """Return the number of rows of a step by sub-batch. `batch_size` must be one that `validate` accepts."""
    counts = sub_batch_rows_per_block(data)[0]
    return {name: batch_size * count // sum(counts.values()) for name, count in counts.items()}


def loss_weight_type(data: DataConfig) -> str:
    """Return the type of the loss weights: int32, or float32 where an objective weights its scored tokens."""
    return "float32" if any(objective.fractional_loss_weights for objective in data.objectives) else "int32"


def batch_spec(run: RunConfig) -> BatchSpec:
    """Return the global batch that `run` trains on: for each sub-batch the features of `sub_batch_spec`.

    With a stored teacher, `teacher_ids` (int32) and `teacher_log_probs` (float32) are [rows, target length, top_k].
    """
    shapes = row_shapes(run.data)
    rows = rows_per_sub_batch(run.data, run.training.global_batch_size)
    found = {name: sub_batch_spec(run.data, shape, rows[name]) for name, shape in shapes.items()}
    distillation = run.training.distillation
    if distillation is None or distillation.top_k is None:
        return found
    return {
        name: {**features, **_teacher_spec(run.data, features, distillation.top_k)} for name, features in found.items()
    }


def _teacher_spec(data: DataConfig, features: Mapping[str, ArraySpec], top_k: int) -> Mapping[str, ArraySpec]:
    shape = (*features[f"{data.target_stack}_target_tokens"].shape, top_k)
    return {TEACHER_IDS: ArraySpec(shape, "int32"), TEACHER_LOG_PROBS: ArraySpec(shape, "float32")}


def evaluation_spec(run: RunConfig) -> BatchSpec:
    """Return the global batch that `run` is evaluated on: full rows, with one window or document each."""
    shape = RowShape(run.data.inputs_length, run.data.targets_length, packed=run.data.mask_document_borders)
    return {MAIN: sub_batch_spec(run.data, shape, run.training.global_batch_size)}


def sub_batch_spec(data: DataConfig, shape: RowShape, rows: int) -> Mapping[str, ArraySpec]:
    """Return the features of a sub-batch by layout, all int32 of [rows, length]; loss weights: `loss_weight_type`.

    encoder_decoder: encoder_input_tokens, decoder_input_tokens, decoder_target_tokens, decoder_loss_weights; with block
      diffusion also decoder_causal_attention, which is 1 for the whole block.
    prefix_lm: decoder_input_tokens, decoder_target_tokens, decoder_loss_weights, decoder_causal_attention (1 where
      attention is bidirectional: the inputs and one position more, seqio's rule).
    causal_lm: the same without decoder_causal_attention.
    encoder: encoder_input_tokens, encoder_target_tokens, encoder_loss_weights.
    Packed rows also have segment ids and positions (encoder_segment_ids, encoder_positions, decoder_segment_ids,
      decoder_positions) for each stack of the layout.
    Labelled examples have input tokens only (in prefix_lm also decoder_causal_attention, which is 1 for the whole
      text), `labels` and `label_weights`: [rows], or [rows, length] for token classification; labels are float32 for
      regression. Embeddings have `positive_input_tokens` instead of labels, and for hard negatives k = 1, 2, ...
      `negative_{k}_input_tokens` and `negative_{k}_weights` [rows], which are 0 where the row has no such negative.
    Preference pairs have these features of the prompt with the chosen answer, and `rejected_decoder_...` of the prompt
      with the rejected one, for each feature of the decoder; the prompt of an encoder is that of both. The
      log-probabilities of the two answers under the reference are `chosen_reference` and `rejected_reference`, float32
      [rows]. In packed rows, segment s has those at [row, s - 1] of [rows, pairs_per_row], and the segments of a pair
      have the same number in all features.
    `denoiser_ids` are indices into `data.objectives`: [rows], or [rows, length] by target position if rows are packed.
      Rows of seqio's Tasks do not have them.
    """
    if data.labelled is not None:
        return _labelled_spec(data, data.labelled, rows)
    features: dict[str, tuple[int, ...]] = {}
    for stack, length in row_positions(data.layout, shape.inputs_length, shape.targets_length).items():
        targets = (rows, length)  # In the end those of the last stack, which has the targets.
        features[f"{stack}_input_tokens"] = targets
        if shape.packed:
            features |= {f"{stack}_segment_ids": targets, f"{stack}_positions": targets}
    features |= {f"{stack}_target_tokens": targets, f"{stack}_loss_weights": targets}
    if data.has_bidirectional_decoder:
        features["decoder_causal_attention"] = targets
    if data.preference is not None:
        features |= {f"{REJECTED}{name}": size for name, size in features.items() if name.startswith("decoder")}
        references = (rows, data.preference.pairs_per_row) if shape.packed else (rows,)
        features |= {CHOSEN_REFERENCE: references, REJECTED_REFERENCE: references}
    if data.seqio is None:
        features["denoiser_ids"] = targets if shape.packed else (rows,)
    types = {CHOSEN_REFERENCE: "float32", REJECTED_REFERENCE: "float32"}
    types |= {name: loss_weight_type(data) for name in features if name.endswith("_loss_weights")}
    return {name: ArraySpec(size, types.get(name, "int32")) for name, size in features.items()}


def _labelled_spec(data: DataConfig, objective: LabeledExamples, rows: int) -> Mapping[str, ArraySpec]:
    """Return the features of labelled examples by the kind of their task head."""
    text: tuple[int, ...] = (rows, data.row_length)
    features = {f"{data.target_stack}_input_tokens": ArraySpec(text, "int32")}
    if has_bidirectional_prefix(data.layout):
        features["decoder_causal_attention"] = ArraySpec(text, "int32")
    weights: tuple[int, ...] = (rows,)
    match objective.kind:
        case "classification":
            features["labels"] = ArraySpec((rows,), "int32")
        case "regression":
            features["labels"] = ArraySpec((rows,), "float32")
        case "token_classification":
            features["labels"] = ArraySpec(text, "int32")
            weights = text
        case "embedding":
            features[POSITIVE] = ArraySpec(text, "int32")
            for number in range(1, data.sources[0].corpus.max_negatives + 1):
                features[negative(number)] = ArraySpec(text, "int32")
                features[negative_weights(number)] = ArraySpec((rows,), "int32")
        case kind:
            assert_never(kind)
    return {**features, "label_weights": ArraySpec(weights, "int32"), "denoiser_ids": ArraySpec((rows,), "int32")}
