"""Held-out scores of a set of parameters, computed by the program's compiled evaluation step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from t5x_like.config import RunConfig
from t5x_like.config.continuation import has_bound
from t5x_like.data.store.token_store import Store
from t5x_like.data.stream import heldout
from t5x_like.data.stream.continuation import continuation_batches
from t5x_like.distributed.coordination import compile_on_all
from t5x_like.evaluation import compression_baselines
from t5x_like.evaluation.per_example_loss import PREFIX_LM, row_losses, window_losses
from t5x_like.evaluation.results_store import CONTINUATION, DIFFUSION_BOUND
from t5x_like.evaluation.task_head_metrics import head_rows, head_scores
from t5x_like.monitoring.metrics import WeightedMean, add, compute
from t5x_like.program import Program
from t5x_like.sharding.batch_placement import on_host
from t5x_like.training.losses import is_of_logits
from t5x_like.utils.type_aliases import Features, IntArray, PyTree


def evaluate_held_out(
    program: Program,
    params: PyTree,
    stores: Sequence[Store],
    *,
    step: int,
    num_batches: int,
    split: str = "validation",
    continuation: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Score parameters on a split of the stores that is not trained on.

    The scored rows do not depend on the step, the seed or the mesh.

    Args:
      program: A program of any architecture.
      params: Parameters, sharded over the mesh or not.
      step: Step that the result records.
      num_batches: Number of held-out batches per objective and for the prefix LM; fewer if there is too little text.
      split: Split to score.
      continuation: Given and scored tokens of the windows of the score "continuation"; None:
        `evaluation.continuation` of the run.

    Returns:
      step: The step.
      split: The split, unless it is "validation".
      held_out: Identity of each store's held-out text, of which the first batches are scored: fingerprints of the store
        and of its tokenizer, number of documents, bytes of text.
      objectives: Scores by name: the mixture's objective, with several corpora "corpus/objective", or the seqio Task.
        Each has loss (nats per scored token), perplexity (its exponential), accuracy, tokens, and the metrics that the
        model itself reports. A task head has the metrics of `head_scores` instead of perplexity, and its number of
        examples as tokens; preference pairs have those of `training.preference`, and their number as tokens.
      prefix_lm: Scores of windows whose first half is given: loss_per_token (nats), bits_per_byte (the loss of all
        scored tokens over the bytes of their text; EOS between documents is scored and has no bytes), bytes. None for
        models that predict tokens in place, such as encoders.
      diffusion_bound: For these, the same by the bound of masked diffusion (`heldout.bound_batches`), an upper bound of
        the negative log-likelihood: loss_per_token, bits_per_byte, bytes. Present only if there is one. The bound is
        that of the generator in a model that has one.
      continuation: For the windows of `evaluation.continuation`, with which models of all architectures can be
        compared: loss_per_token, bits_per_byte and bytes of the scored tokens; given, scored, and the number of
        windows; digest of all of them, equal for models that were scored on the same windows; is_bound, whether the
        scores are the bound of masked diffusion. Present only if it is configured.
      baselines: Bits per byte of the same bytes by codes without knowledge of language. The unigram code uses the same
        tokens and the token frequencies of the training split. None without scores of text.
    """
    data, rows = program.run.data, program.run.training.global_batch_size
    objectives = {}
    if data.seqio is not None:
        from t5x_like.data.seqio_.live_dataset import validation_batches

        sums = _sums(program, params, validation_batches(data, rows, num_batches, split))
        if sums["loss"].weight:
            objectives[data.seqio.mixture_or_task] = _scores(sums)
    for share, store in zip(data.sources, stores, strict=True):
        for objective in data.objectives_of(share):
            batches = heldout.objective_batches(store, data, share, rows, objective, num_batches, split)
            sums = _sums(program, params, batches)
            name = f"{share.name}/{objective.name}" if len(stores) > 1 else objective.name
            objectives[name] = _scores(sums)
            if data.labelled is not None or data.preference is not None:
                # The loss of labels, numbers or pairs: its exponential is no perplexity of text.
                del objectives[name]["perplexity"]
            if data.labelled is not None:
                batches = heldout.objective_batches(store, data, share, rows, objective, num_batches, split)
                objectives[name] |= head_scores(program, params, batches)
    scored = [batch for store in stores for batch in heldout.prefix_lm_batches(store, data, rows, num_batches, split)]
    # All corpora together: bits per byte of one text, which models with other tokenizers can be compared on.
    text = b"".join(batch.text for batch in scored)
    result: dict[str, Any] = {
        "step": step,
        "held_out": [_identity(store, split) for store in stores],
        "objectives": objectives,
        "prefix_lm": None,
        "baselines": None,
    }
    if split != "validation":
        result["split"] = split
    if text:
        loss = _sums(program, params, [batch.batch for batch in scored])["loss"]
        result["prefix_lm"] = _text_scores(loss, len(text))
        result["baselines"] = _baselines(stores, np.concatenate([batch.tokens for batch in scored]), text)
    windows = [window for store in stores for window in heldout.bound_batches(store, data, rows, num_batches, split)]
    if text := b"".join(text for window in windows for text in window.texts):
        bounds = window_losses(program, params, windows)
        loss = WeightedMean(sum(row["loss"] for row in bounds), sum(row["tokens"] for row in bounds))
        result[DIFFUSION_BOUND] = _text_scores(loss, len(text))
        tokens = np.concatenate([window.tokens_NxT.ravel() for window in windows])
        result["baselines"] = _baselines(stores, tokens, text)
    continuation = continuation or program.run.evaluation.continuation
    continued = [row for store in stores for row in _continuation_rows(program, params, store, split, continuation)]
    if continuation is not None and continued:
        result[CONTINUATION] = _continuation_scores(program.run, continued, *continuation)
    return result


def _continuation_rows(
    program: Program, params: PyTree, store: Store, split: str, continuation: tuple[int, int] | None
) -> list[dict[str, Any]]:
    """Return the losses of the windows of a continuation; none if it is None, or for a corpus of pairs."""
    if continuation is None or store.sequences_per_document > 1:
        return []
    rows, windows = program.run.training.global_batch_size, program.run.evaluation.continuation_windows
    batches = continuation_batches(store, program.run.data, rows, *continuation, windows, split)
    return window_losses(program, params, batches)


def _continuation_scores(run: RunConfig, rows: Sequence[Mapping[str, Any]], given: int, scored: int) -> dict[str, Any]:
    loss = WeightedMean(sum(row["loss"] for row in rows), sum(row["tokens"] for row in rows))
    digest = hashlib.sha256(" ".join(str(row["digest"]) for row in rows).encode()).hexdigest()[:16]
    return {
        **_text_scores(loss, sum(row["bytes"] for row in rows)),
        "given": given,
        "scored": scored,
        "windows": len(rows),
        "digest": digest,
        "is_bound": has_bound(run.data),
    }


def _text_scores(loss: WeightedMean, num_bytes: int) -> dict[str, float]:
    return {
        "loss_per_token": compute(loss),
        "bits_per_byte": bits_per_byte(loss, num_bytes),
        "bytes": num_bytes,
    }


def _baselines(stores: Sequence[Store], tokens: IntArray, text: bytes) -> dict[str, float]:
    counts = np.sum([store.split("train").token_counts() for store in stores], axis=0)
    return {
        "unigram_bits_per_byte": compression_baselines.unigram_bits(counts, tokens) / len(text),
        "byte_entropy_bits_per_byte": compression_baselines.byte_entropy(text),
        "gzip_bits_per_byte": compression_baselines.gzip_bits_per_byte(text),
        "lzma_bits_per_byte": compression_baselines.lzma_bits_per_byte(text),
    }


def _identity(store: Store, name: str) -> dict[str, Any]:
    split = store.split(name)
    return {
        "fingerprint": store.fingerprint,
        "tokenizer": store.info["tokenizer_fingerprint"],
        "documents": split.num_documents,
        "bytes": split.num_bytes,
    }


def _scores(sums: Mapping[str, WeightedMean]) -> dict[str, float]:
    return {
        "loss": compute(sums["loss"]),
        "perplexity": perplexity(compute(sums["loss"])),
        **({"accuracy": compute(sums["accuracy"])} if sums["accuracy"].weight else {}),
        "tokens": round(sums["loss"].weight),
        **{name: compute(mean) for name, mean in sums.items() if not is_of_logits(name)},
    }


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity where it overflows a float."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss: WeightedMean, num_bytes: int) -> float:
    """Return the bits per byte of text whose tokens have the summed cross-entropy `loss.sum` in nats."""
    return float(loss.sum) / math.log(2) / num_bytes


def held_out_rows(
    program: Program,
    params: PyTree,
    stores: Sequence[Store],
    *,
    num_batches: int,
    split: str = "validation",
    continuation: tuple[int, int] | None = None,
) -> list[dict[str, Any]]:
    """Return the rows that the losses of `evaluate_held_out` are computed from.

    Each row has its objective, its index, and the entries of `row_losses`. The windows whose first half is given have
    the objective "prefix_lm", or "diffusion_bound" where they are scored by that bound, and the windows of
    `evaluation.continuation` have "continuation". Texts with the labels of a head have the entries of `head_rows`.
    Other task heads and preference pairs, which score no single tokens, and Tasks that are read live have no rows.
    """
    data, rows = program.run.data, program.run.training.global_batch_size
    continuation = continuation or program.run.evaluation.continuation
    result: list[dict[str, Any]] = []
    for share, store in zip(data.sources, stores, strict=True):
        batches = {
            (f"{share.name}/{objective.name}" if len(stores) > 1 else objective.name): heldout.objective_batches(
                store, data, share, rows, objective, num_batches, split
            )
            for objective in data.objectives_of(share)
            if data.labelled is None and data.preference is None
        }
        windows = heldout.prefix_lm_batches(store, data, rows, num_batches, split)
        batches[f"{share.name}/{PREFIX_LM}" if len(stores) > 1 else PREFIX_LM] = (window.batch for window in windows)
        for name, objective_batches in batches.items():
            losses = row_losses(program, params, objective_batches, store.tokenizer)
            result += [{"objective": name, "row": number, **row} for number, row in enumerate(losses)]
        if data.labelled is not None:
            labelled = heldout.objective_batches(store, data, share, rows, data.labelled, num_batches, split)
            found = head_rows(program, params, labelled, store)
            name = f"{share.name}/{data.labelled.name}" if len(stores) > 1 else data.labelled.name
            result += [{"objective": name, "row": number, **row} for number, row in enumerate(found)]
        bounds = window_losses(program, params, heldout.bound_batches(store, data, rows, num_batches, split))
        continued = _continuation_rows(program, params, store, split, continuation)
        for name, losses in {DIFFUSION_BOUND: bounds, CONTINUATION: continued}.items():
            full_name = f"{share.name}/{name}" if len(stores) > 1 else name
            result += [{"objective": full_name, "row": number, **row} for number, row in enumerate(losses)]
    return result


def _sums(program: Program, params: PyTree, batches: Iterable[Mapping[str, Features]]) -> dict[str, WeightedMean]:
    """Return the metrics summed over batches in double precision on the host, without a synchronization per batch."""
    steps: list[Mapping[str, WeightedMean]] = []
    for batch in batches:
        placed = program.shard_global_batch(batch)
        if not steps:
            compile_on_all(program.eval_step, params, placed)
        steps.append(program.eval_step(params, placed))
    total = {name: WeightedMean(0.0, 0.0) for name in ("loss", "accuracy")}
    # One transfer at the end. Sums are added as Python floats: float32 would lose small terms over thousands of
    # batches.
    for metrics in on_host(steps):
        total = add(total, {name: WeightedMean(float(mean.sum), float(mean.weight)) for name, mean in metrics.items()})
    return total
