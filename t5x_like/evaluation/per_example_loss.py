"""Loss of each held-out row, and what is computed from it: intervals, and draws for a paired comparison."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.data.stream.heldout import WindowBatches
from t5x_like.data.tokenizers.tokenizer import Tokenizer
from t5x_like.distributed.coordination import compile_on_all
from t5x_like.evaluation import bootstrap
from t5x_like.evaluation.results_store import BITS_BOUND, BITS_OF_CONTINUATION, CONTINUATION, DIFFUSION_BOUND
from t5x_like.kernels.cross_entropy import cross_entropy
from t5x_like.program import Program
from t5x_like.training.losses import is_best_token, targets_and_weights
from t5x_like.utils.type_aliases import Features, FloatArray, PyTree

HELD_OUT = "held_out.jsonl"
PREFIX_LM = "prefix_lm"
"""Name of the objective of windows whose first half is the prefix."""


def row_losses(
    program: Program, params: PyTree, batches: Iterable[Mapping[str, Features]], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Return the losses of all rows that have a weight above 0, in order.

    Returns:
      For each row: `loss` (sum over tokens, in nats), `tokens` (sum of the weights), `correct` (the part of `tokens`
      whose target has the largest logit), `bytes` (number of bytes of the text of the scored tokens), and `digest` of
      these bytes, by which rows of the same text are found in two models.
    """
    rows = []
    for batch in batches:
        features = batch["main"]
        placed = program.shard_global_batch(batch)["main"]
        sums_R, weights_R, correct_R = jax.device_get(_row_losses(program, params, placed))
        targets, weights = targets_and_weights(features)  # type: ignore[arg-type]
        # Rows that only complete a batch have weight 0.
        for row in np.flatnonzero(weights_R):
            scored = np.asarray(targets[row])[np.asarray(weights[row]) > 0]
            text = tokenizer.to_bytes(scored.tolist())
            rows.append(
                {
                    "loss": float(sums_R[row]),
                    "tokens": float(weights_R[row]),
                    "correct": float(correct_R[row]),
                    "bytes": len(text),
                    "digest": _digest(text),
                }
            )
    return rows


def window_losses(program: Program, params: PyTree, windows: Iterable[WindowBatches]) -> list[dict[str, Any]]:
    """Return the negative log-likelihoods of the scored tokens of held-out windows, in order.

    Returns:
      For each window: `loss` (in nats; where several batches score it, an unbiased estimate of an upper bound),
      `window` (its number in the split), `tokens`, the `bytes` of the scored text, and `digest` of the whole window.
    """
    rows: list[dict[str, Any]] = []
    for window in windows:
        losses_R = np.zeros(0)
        for batch in window.batches:
            placed = program.shard_global_batch(batch)["main"]
            if not rows and not losses_R.size:
                compile_on_all(_row_losses, program, params, placed)
            sums_R, *_ = jax.device_get(_row_losses(program, params, placed))
            losses_R = losses_R + sums_R if losses_R.size else sums_R.astype(np.float64)
        tokens = float(window.tokens_NxT.shape[1])
        # Rows that only complete a batch come last and have no text.
        for loss, number, text, digest in zip(
            losses_R, window.window_N.tolist(), window.texts, window.digests, strict=False
        ):
            sizes = {"tokens": tokens, "bytes": len(text)}
            rows.append({"window": number, "loss": float(loss), **sizes, "digest": digest})
    return rows


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


@functools.partial(jax.jit, static_argnums=0)
def _row_losses(
    program: Program, params: PyTree, features: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (summed loss [R], summed weight [R], summed weight of correct tokens [R]), replicated over the devices."""
    with program.mesh_context():
        loss_RxL, weights_RxL, is_best_RxL = _scored_tokens(program, params, features)
        terms = (loss_RxL * weights_RxL, weights_RxL, is_best_RxL * weights_RxL)
        loss_R, weight_R, correct_R = (jnp.sum(term, axis=-1) for term in terms)
        return jax.lax.with_sharding_constraint(
            (loss_R, weight_R, correct_R), NamedSharding(program.mesh, PartitionSpec())
        )


def token_losses(program: Program, params: PyTree, features: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return (loss in nats [R, L], loss weights float32 [R, L]) of each target; call it in the program's mesh."""
    loss_RxL, weights_RxL, _ = _scored_tokens(program, params, features)
    return loss_RxL, weights_RxL


def _scored_tokens(
    program: Program, params: PyTree, features: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (loss in nats, loss weights, 1 where the target has the largest logit) of each target: [R, L] float32."""
    output = program.model(params).output(features)
    targets, weights = output.targets or targets_and_weights(features)
    # The plain loss, whatever training adds to it, so that models of different runs can be compared.
    loss_RxL, _ = cross_entropy(output.logits, targets, z_loss=0.0, label_smoothing=0.0)
    return loss_RxL, weights.astype(jnp.float32), is_best_token(output.logits, targets)


def held_out_intervals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return bootstrap intervals over the rows, by the names of `results_store.scalars`."""
    return {name: bootstrap.interval(values) for name, values in held_out_draws(rows).items()}


def held_out_draws(rows: Sequence[Mapping[str, Any]]) -> dict[str, FloatArray]:
    """Return the loss and the accuracy of each objective ("loss/NAME", "accuracy/NAME") and the bits per byte
    ("bits_per_byte", or "bits_per_byte_bound", and "continuation_bits_per_byte") on each bootstrap draw of the rows:
    [draws].

    Args:
      rows: Output of `row_losses`, with the name of the `objective` of each row.
    """
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(str(row["objective"]), []).append(row)
    draws = {}
    for name, some in by_name.items():
        sums, tokens, sizes = (np.array([float(row[key]) for row in some]) for key in ("loss", "tokens", "bytes"))
        if name.rpartition("/")[2] == PREFIX_LM:
            draws[name.replace(PREFIX_LM, "bits_per_byte")] = bootstrap.ratio_draws(sums, sizes) / math.log(2)
        elif name.rpartition("/")[2] == DIFFUSION_BOUND:
            draws[name.replace(DIFFUSION_BOUND, BITS_BOUND)] = bootstrap.ratio_draws(sums, sizes) / math.log(2)
        elif name.rpartition("/")[2] == CONTINUATION:
            draws[name.replace(CONTINUATION, BITS_OF_CONTINUATION)] = bootstrap.ratio_draws(sums, sizes) / math.log(2)
        else:
            draws[f"loss/{name}"] = bootstrap.ratio_draws(sums, tokens)
            if all("correct" in row for row in some):
                correct = np.array([float(row["correct"]) for row in some])
                draws[f"accuracy/{name}"] = bootstrap.ratio_draws(correct, tokens)
    # The windows of several corpora together, as in the score of the model.
    if continued := [row for name, some in by_name.items() if name.endswith(f"/{CONTINUATION}") for row in some]:
        sums, sizes = (np.array([float(row[key]) for row in continued]) for key in ("loss", "bytes"))
        draws[BITS_OF_CONTINUATION] = bootstrap.ratio_draws(sums, sizes) / math.log(2)
    return draws
