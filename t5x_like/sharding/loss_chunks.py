"""Size of the chunks of tokens in which the loss of a run is computed (`kernels.linear_cross_entropy`)."""

from __future__ import annotations

from t5x_like.config import RunConfig

MAX_LOGITS_BYTES = 256 * 2**20
"""Bytes of float32 logits per device up to which the loss is computed from all of them, if the run does not choose."""
CHUNK_BYTES = 64 * 2**20
"""Bytes of the float32 logits of a chunk beyond that, unless it would have fewer tokens than the head is wide."""


def loss_chunk_tokens(chosen: int | None, tokens: int, width: int, vocabulary: int) -> int:
    """Return the number of tokens whose logits exist at once on a device; 0: those of all.

    Args:
      chosen: `TrainingConfig.loss_chunk_tokens`.
      tokens: Tokens of a sub-batch on the device.
      width: Width of the head.
      vocabulary: Size of the vocabulary on the device.
    """
    if chosen is not None:
        return chosen
    # Each chunk adds its gradient of the kernel to that of all. With fewer tokens than the head is wide, this takes
    # more memory traffic than the products.
    return max(width, CHUNK_BYTES // (4 * vocabulary)) if 4 * tokens * vocabulary > MAX_LOGITS_BYTES else 0


def needs_all_logits(run: RunConfig) -> bool:
    """Return whether something other than the cross-entropy of targets reads the logits of a run's model."""
    return run.model.generator is not None or run.training.distillation is not None or run.data.preference is not None


def chunk_share(run: RunConfig, tokens: int, vocabulary: int) -> float | None:
    """Return the share of a sub-batch's tokens whose logits exist at once; None if they all do.

    Args:
      run: The run.
      tokens: Tokens of the sub-batch on a device.
      vocabulary: Size of the vocabulary on a device.
    """
    if needs_all_logits(run):
        return None
    chunk = loss_chunk_tokens(run.training.loss_chunk_tokens, tokens, run.model.lm_head_width, vocabulary)
    # With a single chunk the gradient of the head takes the place of the logits.
    return chunk / tokens if 0 < chunk < tokens else None
