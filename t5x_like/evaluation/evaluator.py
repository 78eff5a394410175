"""Held-out scores of a set of parameters, through the program's own compiled evaluation step."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like.config.objectives import Labelled
from t5x_like.data import validation
from t5x_like.data.store import Split, Store
from t5x_like.evaluation import baselines
from t5x_like.evaluation.heads import head_scores
from t5x_like.evaluation.held_out import PREFIX_LM
from t5x_like.evaluation.row_losses import row_losses
from t5x_like.monitoring.metrics import Mean, add, value
from t5x_like.partitioning.agreement import compile_together
from t5x_like.partitioning.rows import on_host
from t5x_like.program import Program
from t5x_like.training.losses import is_of_logits

Tree = Any
Features = Mapping[str, npt.NDArray[Any]]


def evaluate(program: Program, params: Tree, stores: Sequence[Store], *, step: int, num_batches: int) -> dict[str, Any]:
    """Scores on the stores' held-out splits; the same rows whatever the step, the seed and the mesh.

    Args:
      program: Any architecture.
      params: Parameters, split over the mesh or not.
      step: Goes into the result.
      num_batches: Held-out batches per objective, and for the prefix LM; fewer where there is not so much text.

    Returns:
      step: The step.
      objectives: By name of the mixture's objectives, of several corpora by "corpus/objective", or of the seqio Task:
        loss (nats per scored token), perplexity (its exponential), accuracy, tokens; of a head no perplexity but what
        `heads.head_scores` says, with examples for tokens; and what the model itself reports, under its names.
      prefix_lm: Of windows whose first half is given: loss_per_token (nats), bits_per_byte (the loss of all scored
        tokens over the bytes of their text; EOS between documents is scored and has no bytes), bytes. None for
        encoders, as are the baselines.
      baselines: Bits per byte of the same bytes by codes that know no language. The unigram code's are for the same
        tokens, under the frequencies of the training split.
    """
    data, rows = program.run.data, program.run.training.batch_size
    objectives = {}
    if data.seqio is not None:
        from t5x_like.data.seqio_live import validation_batches

        sums = _sums(program, params, validation_batches(data, rows, num_batches))
        if sums["loss"].weight:
            objectives[data.seqio.mixture_or_task] = _scores(sums)
    for share, store in zip(data.sources, stores, strict=True):
        for objective in data.objectives_of(share):
            batches = validation.objective_batches(store, data, share, rows, objective, num_batches)
            sums = _sums(program, params, batches)
            name = f"{share.name}/{objective.name}" if len(stores) > 1 else objective.name
            objectives[name] = _scores(sums)
            if isinstance(objective, Labelled):
                del objectives[name]["perplexity"]
                batches = validation.objective_batches(store, data, share, rows, objective, num_batches)
                objectives[name] |= head_scores(program, params, batches)
    scored = [batch for store in stores for batch in validation.prefix_lm_batches(store, data, rows, num_batches)]
    text = b"".join(batch.text for batch in scored)
    result: dict[str, Any] = {"step": step, "objectives": objectives, "prefix_lm": None, "baselines": None}
    if text:
        tokens = np.concatenate([batch.tokens for batch in scored])
        loss = _sums(program, params, [batch.batch for batch in scored])["loss"]
        result["prefix_lm"] = {
            "loss_per_token": value(loss),
            "bits_per_byte": bits_per_byte(loss, len(text)),
            "bytes": len(text),
        }
        size = stores[0].vocabulary.vocab_size
        counts = np.sum([_train_counts(store.split("train"), size) for store in stores], axis=0)
        result["baselines"] = {
            "unigram_bits_per_byte": baselines.unigram_bits(counts, tokens) / len(text),
            "byte_entropy_bits_per_byte": baselines.byte_entropy(text),
            "gzip_bits_per_byte": baselines.gzip_bits_per_byte(text),
            "lzma_bits_per_byte": baselines.lzma_bits_per_byte(text),
        }
    return result


def _scores(sums: Mapping[str, Mean]) -> dict[str, float]:
    return {
        "loss": value(sums["loss"]),
        "perplexity": perplexity(value(sums["loss"])),
        **({"accuracy": value(sums["accuracy"])} if sums["accuracy"].weight else {}),
        "tokens": round(sums["loss"].weight),
        **{of: value(mean) for of, mean in sums.items() if not is_of_logits(of)},
    }


def perplexity(loss: float) -> float:
    """exp(loss); infinite beyond what a float holds."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss: Mean, num_bytes: int) -> float:
    """Bits per byte of text whose tokens have the summed cross-entropy `loss.sum`, in nats."""
    return float(loss.sum) / math.log(2) / num_bytes


def held_out_rows(program: Program, params: Tree, stores: Sequence[Store], *, num_batches: int) -> list[dict[str, Any]]:
    """The rows behind `evaluate`'s losses: objective, place, and what `row_losses` says of each. The windows whose
    first half is given are under "prefix_lm". None of heads, which score no tokens, and of Tasks that are read live."""
    data, rows = program.run.data, program.run.training.batch_size
    found: list[dict[str, Any]] = []
    for share, store in zip(data.sources, stores, strict=True):
        batches = {
            (f"{share.name}/{objective.name}" if len(stores) > 1 else objective.name): validation.objective_batches(
                store, data, share, rows, objective, num_batches
            )
            for objective in data.objectives_of(share)
            if not isinstance(objective, Labelled)
        }
        windows = validation.prefix_lm_batches(store, data, rows, num_batches)
        batches[f"{share.name}/{PREFIX_LM}" if len(stores) > 1 else PREFIX_LM] = (one.batch for one in windows)
        for name, some in batches.items():
            losses = row_losses(program, params, some, store.tokenizer)
            found += [{"objective": name, "row": number, **row} for number, row in enumerate(losses)]
    return found


@functools.lru_cache(maxsize=16)
def _train_counts(split: Split, vocab_size: int) -> npt.NDArray[np.int64]:
    """Counted once per process: a training run evaluates more than once."""
    return split.token_counts(vocab_size)


def _sums(program: Program, params: Tree, batches: Iterable[Mapping[str, Features]]) -> dict[str, Mean]:
    """Metrics added over batches, in double precision on the host; the device runs ahead of it."""
    steps: list[Mapping[str, Mean]] = []
    for batch in batches:
        placed = program.put_whole(batch)
        if not steps:
            compile_together(program.eval_step, params, placed)
        steps.append(program.eval_step(params, placed))
    total = {name: Mean(0.0, 0.0) for name in ("loss", "accuracy")}
    for metrics in on_host(steps):
        total = add(total, {name: Mean(float(mean.sum), float(mean.weight)) for name, mean in metrics.items()})
    return total
