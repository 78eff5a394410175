"""Metrics of task heads besides loss and accuracy: F1, correlations, and retrieval ranks."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, assert_never, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.config.model import TaskHeadConfig
from t5x_like.data.store.token_store import Store
from t5x_like.data.stream import heldout
from t5x_like.data.stream.labeled_rows import label_text
from t5x_like.evaluation.agreement import macro_f1, pearson, spearman
from t5x_like.models.task_heads import TaskModel, shortened, stack_sides
from t5x_like.program import Program
from t5x_like.utils.type_aliases import Features, FloatArray, PyTree


def head_scores(program: Program, params: PyTree, batches: Iterable[Mapping[str, Features]]) -> dict[str, float]:
    """Return the scores of a head over all examples of the batches.

    All scores are in per cent, as in `text_metrics`.

    Returns:
      Classes: f1_macro, the mean F1 of the labels that occur or are predicted; majority, the accuracy of always
      predicting the most frequent label. Numbers: pearson, spearman, r2. Embeddings: recall_at_1, recall_at_10 and mrr
      of each text's positive among the positives of all texts, and the same of each trained prefix of d dimensions as
      recall_at_1_of_d and so on.
    """
    head = program.run.model.task_head
    assert head is not None
    outputs, true = [], []
    for batch in batches:
        features = batch["main"]
        scores = _scored(program, params, features)
        counts = features["label_weights"] > 0
        outputs.append(_predictions(head, scores, rows=len(counts))[counts])
        if "labels" in features:
            true.append(features["labels"][counts])
    if not outputs or not sum(map(len, outputs)):
        return {}
    predicted = np.concatenate(outputs)
    match head.kind:
        case "embedding":
            found = retrieval(predicted[:, 0], predicted[:, 1])
            for size in head.matryoshka_dimensions:
                prefix = np.asarray(shortened(jnp.asarray(predicted[:, :2]), size, normalize=head.normalize))
                scores_of = retrieval(prefix[:, 0], prefix[:, 1])
                found |= {f"{name}_of_{size}": score for name, score in scores_of.items()}
            return found
        case "classification" | "token_classification":
            return classification_scores(np.concatenate(true), predicted)
        case "regression":
            return regression_scores(np.concatenate(true).astype(np.float64), predicted.astype(np.float64))
        case unknown:
            assert_never(unknown)


def head_rows(
    program: Program, params: PyTree, batches: Iterable[Mapping[str, Features]], store: Store
) -> list[dict[str, Any]]:
    """Return the results of a head that predicts classes for each text, in order; none for other heads.

    Returns:
      For each text: `loss` (summed over its labels, in nats), `tokens` (their number), `correct` (how many are
      predicted), and `digest` of the text and its labels, which is the same for models of other architectures unless
      their rows cut the text.
    """
    head = program.run.model.task_head
    if head is None or head.kind not in ("classification", "token_classification"):
        return []
    stack, vocabulary, rows = program.run.data.target_stack, store.vocabulary, []
    special = (vocabulary.pad_id, vocabulary.start_id, vocabulary.eos_id)
    for batch in batches:
        features = batch["main"]
        scores = _scored(program, params, features).astype(np.float64)
        log_probs = scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)
        for row in range(len(scores)):
            # Of a text, or of each of its tokens.
            scored = np.atleast_1d(features["label_weights"][row] > 0)
            if not scored.any():
                continue
            labels = np.atleast_1d(features["labels"][row])[scored]
            found = log_probs[row].reshape(len(scored), -1)[scored]
            tokens = features[f"{stack}_input_tokens"][row]
            text = f"{tokens[~np.isin(tokens, special)].tolist()} {labels.tolist()}"
            rows.append(
                {
                    "loss": float(-found[np.arange(len(labels)), labels].sum()),
                    "tokens": float(len(labels)),
                    "bytes": 0,
                    "correct": int((found.argmax(axis=-1) == labels).sum()),
                    "digest": hashlib.sha256(text.encode()).hexdigest()[:16],
                }
            )
    return rows


def _predictions(head: TaskHeadConfig, scores: npt.NDArray[Any], *, rows: int) -> npt.NDArray[Any]:
    """Return what the outputs of a head stand for: class indices, numbers, or [rows, sides, d] vectors."""
    match head.kind:
        case "classification" | "token_classification":
            return scores.argmax(-1)
        case "regression":
            return scores
        case "embedding":
            return scores.reshape(rows, -1, scores.shape[-1])
        case unknown:
            assert_never(unknown)


def classification_scores(true_N: npt.NDArray[Any], predicted_N: npt.NDArray[Any]) -> dict[str, float]:
    """Return f1_macro and majority of class indices; see `head_scores`."""
    # Labels that neither occur nor are predicted would have an F1 of 0, and would lower the mean only because
    # they are rare.
    labels, counts = np.unique(true_N, return_counts=True)
    f1 = macro_f1(true_N.tolist(), predicted_N.tolist(), np.union1d(labels, predicted_N).tolist())
    return {"f1_macro": f1, "majority": 100 * float(counts.max() / counts.sum())}


def regression_scores(true_N: FloatArray, predicted_N: FloatArray) -> dict[str, float]:
    """Return pearson, spearman and r2; nan if either side is constant."""
    total = float(np.square(true_N - true_N.mean()).sum())
    r2 = 1 - float(np.square(true_N - predicted_N).sum()) / total if total else float("nan")
    return {"pearson": pearson(true_N, predicted_N), "spearman": spearman(true_N, predicted_N), "r2": 100 * r2}


def retrieval(queries_Nxd: npt.NDArray[Any], documents_Nxd: npt.NDArray[Any]) -> dict[str, float]:
    """Return recall_at_1, recall_at_10 and mrr of document n for query n among all documents.

    Ties count against the document.
    """
    own_N = np.einsum("nd,nd->n", queries_Nxd, documents_Nxd)
    ranks = []
    for start in range(0, len(own_N), 1024):
        part = slice(start, start + 1024)
        # In parts of 1,024 queries, because all N x N products may not fit into memory. The tolerance makes equal
        # vectors ties despite rounding.
        nearer = queries_Nxd[part] @ documents_Nxd.T >= own_N[part, None] - 1e-6
        ranks.append(nearer.sum(1))
    rank_N = np.maximum(np.concatenate(ranks), 1)
    return {
        "recall_at_1": 100 * float((rank_N == 1).mean()),
        "recall_at_10": 100 * float((rank_N <= 10).mean()),
        "mrr": 100 * float((1 / rank_N).mean()),
    }


def head_samples(program: Program, params: PyTree, stores: Sequence[Store], count: int) -> list[dict[str, str]]:
    """Return held-out texts with label and prediction; empty for embeddings, which have no prediction."""
    data, head = program.run.data, program.run.model.task_head
    assert data.labelled is not None and head is not None
    if head.kind == "embedding" or not count:
        return []
    samples = []
    for share, store in zip(data.sources, stores, strict=True):
        rows = program.run.training.global_batch_size
        for batch in heldout.objective_batches(store, data, share, rows, data.labelled, num_batches=1):
            features = batch["main"]
            scores = _scored(program, params, features)
            predicted = _predictions(head, scores, rows=rows)
            tokens = features[f"{data.target_stack}_input_tokens"]
            for row in range(min(-(-count // len(stores)), rows)):
                weights = features["label_weights"][row]
                if not np.any(weights):
                    break
                samples.append(
                    {
                        "denoiser": data.labelled.name,
                        "inputs": store.tokenizer.decode(tokens[row][tokens[row] != store.vocabulary.pad_id].tolist()),
                        "targets": label_text(features["labels"][row], weights, head.labels),
                        "prediction": label_text(predicted[row], weights, head.labels),
                    }
                )
    return samples


def _scored(program: Program, params: PyTree, features: Features) -> npt.NDArray[Any]:
    placed = program.shard_global_batch({"main": features})["main"]
    return np.asarray(_scores(program, params, placed))


@functools.partial(jax.jit, static_argnums=0)
def _scores(program: Program, params: PyTree, features: Mapping[str, jax.Array]) -> jax.Array:
    """Return the outputs of the head, replicated over the devices."""
    with program.mesh_context():
        model = cast(TaskModel, program.model(params))
        if program.run.model.task_head is not None and program.run.model.task_head.kind == "embedding":
            features, _ = stack_sides(program.run.model, features)
        scores, _ = model.scores(features)
        # Replicated, so that every process holds the scores of all rows.
        return jax.lax.with_sharding_constraint(scores, NamedSharding(program.mesh, PartitionSpec()))
