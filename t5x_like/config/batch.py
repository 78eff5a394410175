"""The shape of a batch: the only thing that data and model have to agree on.

A step's batch is a dict of sub-batches by name, each a dict of features under seqio's names. All sub-batches of a step
add to one loss. Most runs have one sub-batch, "main"; planning and tests fabricate batches from the specification.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from t5x_like.config.run import RunConfig


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    shape: tuple[int, ...]
    dtype: str


BatchSpec = Mapping[str, Mapping[str, ArraySpec]]
"""Sub-batch name -> feature name -> shape and dtype; the first dimension is the number of rows."""


def batch_spec(run: RunConfig) -> BatchSpec:
    """The global batch that `run` trains on.

    Features by layout, all int32 of [rows, length]; `denoiser_ids` is [rows], an index into `data.mixture`:
      encoder_decoder: encoder_input_tokens, decoder_input_tokens, decoder_target_tokens, decoder_loss_weights.
      prefix_lm: decoder_input_tokens, decoder_target_tokens, decoder_loss_weights, decoder_causal_attention (1 where
        attention is bidirectional: the inputs and one position more, seqio's rule).
      causal_lm: the same without decoder_causal_attention.
      encoder: encoder_input_tokens, encoder_target_tokens, encoder_loss_weights.
    """
    rows = run.training.batch_size
    data = run.data
    encoder = (rows, data.inputs_length)
    decoder = (rows, data.targets_length if data.layout == "encoder_decoder" else data.row_length)
    decoder_features = {
        "decoder_input_tokens": decoder,
        "decoder_target_tokens": decoder,
        "decoder_loss_weights": decoder,
    }
    shapes = {
        "encoder_decoder": {"encoder_input_tokens": encoder, **decoder_features},
        "prefix_lm": {**decoder_features, "decoder_causal_attention": decoder},
        "causal_lm": decoder_features,
        "encoder": {
            "encoder_input_tokens": encoder,
            "encoder_target_tokens": encoder,
            "encoder_loss_weights": encoder,
        },
    }[data.layout]
    features: dict[str, tuple[int, ...]] = {**shapes, "denoiser_ids": (rows,)}
    return {"main": {name: ArraySpec(shape, "int32") for name, shape in features.items()}}
