"""What a head is held to beside its loss: F1, correlations, and where the right text ranks."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.data import validation
from t5x_like.data.labelled import label_text
from t5x_like.data.store import Store
from t5x_like.data.vocabulary import PAD_ID
from t5x_like.models.heads import TaskModel, together
from t5x_like.program import Program

Tree = Any
Floats = npt.NDArray[np.float64]
Features = Mapping[str, npt.NDArray[Any]]


def head_scores(program: Program, params: Tree, batches: Iterable[Mapping[str, Features]]) -> dict[str, float]:
    """Scores of a head over all examples of the batches.

    Returns:
      Of classes: f1_macro, the mean of the labels' F1 over the labels that occur or are predicted; majority, the
      accuracy of always saying the most frequent label. Of numbers: pearson, spearman, r2. Of embeddings, each text
      against the positives of all texts: recall_at_1, recall_at_10, mrr.
    """
    head = program.run.model.task_head
    assert head is not None
    said, true = [], []
    for batch in batches:
        features = batch["main"]
        scores = _scored(program, params, features)
        counts = features["label_weights"] > 0
        if head.kind == "embedding":
            said.append(scores.reshape(len(counts), -1, scores.shape[-1])[counts])
        else:
            said.append((scores.argmax(-1) if head.labels else scores)[counts])
            true.append(features["labels"][counts])
    if not said or not sum(map(len, said)):
        return {}
    found = np.concatenate(said)
    if head.kind == "embedding":
        return retrieval(found[:, 0], found[:, 1])
    labels = np.concatenate(true)
    if head.labels:
        return classes(labels, found, len(head.labels))
    return correlations(labels.astype(np.float64), found.astype(np.float64))


def classes(true_N: npt.NDArray[Any], said_N: npt.NDArray[Any], labels: int) -> dict[str, float]:
    """f1_macro and majority; see `head_scores`."""
    confusion = np.bincount(true_N * labels + said_N, minlength=labels**2).reshape(labels, labels)
    hits, occur, said = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    there = occur + said > 0
    f1 = 2 * hits[there] / (occur + said)[there]
    return {"f1_macro": float(f1.mean()), "majority": float(occur.max() / occur.sum())}


def correlations(true_N: Floats, said_N: Floats) -> dict[str, float]:
    """pearson, spearman (of ranks, equal numbers sharing theirs) and r2; nan where either does not vary."""
    total = float(np.square(true_N - true_N.mean()).sum())
    r2 = 1 - float(np.square(true_N - said_N).sum()) / total if total else float("nan")
    return {"pearson": _pearson(true_N, said_N), "spearman": _pearson(_ranks(true_N), _ranks(said_N)), "r2": r2}


def _pearson(x_N: Floats, y_N: Floats) -> float:
    x, y = x_N - x_N.mean(), y_N - y_N.mean()
    scale = float(np.sqrt(np.square(x).sum() * np.square(y).sum()))
    return float((x * y).sum()) / scale if scale else float("nan")


def _ranks(x_N: Floats) -> Floats:
    _, which_N, counts = np.unique(x_N, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which_N]


def retrieval(queries_Nxd: npt.NDArray[Any], documents_Nxd: npt.NDArray[Any]) -> dict[str, float]:
    """recall_at_1, recall_at_10 and mrr of document n for query n among all documents. Ties count against it."""
    own_N = np.einsum("nd,nd->n", queries_Nxd, documents_Nxd)
    ranks = []
    for start in range(0, len(own_N), 1024):
        part = slice(start, start + 1024)
        nearer = queries_Nxd[part] @ documents_Nxd.T >= own_N[part, None] - 1e-6
        ranks.append(nearer.sum(1))
    rank_N = np.maximum(np.concatenate(ranks), 1)
    return {
        "recall_at_1": float((rank_N == 1).mean()),
        "recall_at_10": float((rank_N <= 10).mean()),
        "mrr": float((1 / rank_N).mean()),
    }


def head_samples(program: Program, params: Tree, stores: Sequence[Store], count: int) -> list[dict[str, str]]:
    """Held-out texts with their label and what the head says; none of embeddings, which say nothing."""
    data, head = program.run.data, program.run.model.task_head
    assert data.labelled is not None and head is not None
    if head.kind == "embedding" or not count:
        return []
    samples = []
    for share, store in zip(data.sources, stores, strict=True):
        rows = program.run.training.batch_size
        for batch in validation.objective_batches(store, data, share, rows, data.labelled, num_batches=1):
            features = batch["main"]
            said = _scored(program, params, features)
            said = said.argmax(-1) if head.labels else said
            tokens = features["encoder_input_tokens" if data.layout == "encoder" else "decoder_input_tokens"]
            for row in range(min(-(-count // len(stores)), rows)):
                weights = features["label_weights"][row]
                if not np.any(weights):
                    break
                samples.append(
                    {
                        "denoiser": data.labelled.name,
                        "inputs": store.tokenizer.decode(tokens[row][tokens[row] != PAD_ID].tolist()),
                        "targets": label_text(features["labels"][row], weights, head.labels),
                        "prediction": label_text(said[row], weights, head.labels),
                    }
                )
    return samples


def _scored(program: Program, params: Tree, features: Features) -> npt.NDArray[Any]:
    placed = program.put_whole({"main": features})["main"]
    return np.asarray(_scores(program, params, placed))


@functools.partial(jax.jit, static_argnums=0)
def _scores(program: Program, params: Tree, features: Mapping[str, jax.Array]) -> jax.Array:
    """What the head says, on every device."""
    with program.activations():
        model = cast(TaskModel, program.model(params))
        if program.run.model.task_head is not None and program.run.model.task_head.kind == "embedding":
            features, _ = together(program.run.model, features)
        scores, _ = model.scores(features)
        return jax.lax.with_sharding_constraint(scores, NamedSharding(program.mesh, PartitionSpec()))
