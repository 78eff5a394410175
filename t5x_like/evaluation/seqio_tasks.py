"""Evaluation of a set of parameters on seqio Tasks, with this package's decoding and log-likelihoods.

TensorFlow and seqio are imported with the first Task, and not at all without Tasks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

import jax
import numpy as np

from t5x_like.config import DataConfig
from t5x_like.config.layouts import has_bidirectional_prefix
from t5x_like.config.seqio_task import EvaluationTask
from t5x_like.data.tokenizers.tokenizer import TokenizerProtocol
from t5x_like.decoding.engine import generate_tokens
from t5x_like.decoding.log_likelihood import score_tokens
from t5x_like.errors import DataError
from t5x_like.evaluation import bootstrap
from t5x_like.evaluation.answer_cache import ROWS_PER_WRITE, AnswerCache
from t5x_like.program import Program
from t5x_like.utils.atomic_write import write_atomically
from t5x_like.utils.digests import json_digest
from t5x_like.utils.jsonl import dumps
from t5x_like.utils.type_aliases import PyTree

if TYPE_CHECKING:
    from t5x_like.data.seqio_.evaluator import EvaluationExample, ModelAnswer, OutputKind, TaskEvaluator, TaskResult


@functools.lru_cache(maxsize=8)
def open_task(config: EvaluationTask, data: DataConfig) -> TaskEvaluator:
    """Return the evaluator with the Task's examples, which are read once per process.

    Raises:
      DataError: see `TaskEvaluator`.
    """
    from t5x_like.data.seqio_.evaluator import TaskEvaluator

    return TaskEvaluator(config, data)


def require_vocabulary(evaluator: TaskEvaluator, program: Program, tokenizer: TokenizerProtocol | None) -> None:
    """Check that the Task's vocabulary is the model's.

    Raises:
      DataError: the Task has another vocabulary.
    """
    foreign = [] if tokenizer is None else evaluator.foreign_vocabularies(tokenizer)
    if foreign:
        raise DataError(
            f"{evaluator.config.mixture_or_task!r}: found another vocabulary than the model's ({'; '.join(foreign)}), "
            "so that the ids stand for other text; register the Task with the run's vocabulary: the spiece.model of "
            "its store, or seqio.ByteVocabulary"
        )
    if evaluator.vocab_size > program.run.model.vocab_size:
        raise DataError(
            f"{evaluator.config.mixture_or_task!r}: found a vocabulary of {evaluator.vocab_size:,} ids, expected at "
            f"most the {program.run.model.vocab_size:,} of the model"
        )


def evaluate_task(
    program: Program,
    params: PyTree,
    config: EvaluationTask,
    *,
    tokenizer: TokenizerProtocol | None = None,
    folder: Path | None = None,
    belongs_to: Mapping[str, Any] | None = None,
    intervals: bool = False,
) -> dict[str, Any]:
    """Return the metrics of a Task, or of each Task of a Mixture.

    Predictions are greedy, as by default in T5X, with up to `targets_length` tokens. A score is the summed
    log-likelihood of the targets. For `predict_with_aux`, aux_values["scores"] is the log-likelihood of the prediction.

    Args:
      tokenizer: Tokenizer of the model, which the Task's vocabulary is compared with; None: only the sizes are
        compared.
      folder: Directory for the rows, TASK.jsonl, and during the evaluation TASK.KIND.partial, from which a killed
        evaluation resumes. None: nothing is written.
      belongs_to: Identity of the parameters; None: no partial files are written.
      intervals: Bootstrap the metrics over the examples.

    Returns:
      tasks: {Task: {metric: value, "examples": count}}
      intervals: {"Task/metric": (low, high) or None}
      notes: Tasks of the Mixture that were skipped.

    Raises:
      UserError: see `open_task` and `require_vocabulary`, or a file cannot be written.
    """
    evaluator = open_task(config, program.run.data)
    require_vocabulary(evaluator, program, tokenizer)
    partials: list[Path] = []

    def answer(task: str, kind: OutputKind, examples: Sequence[EvaluationExample]) -> list[ModelAnswer]:
        from t5x_like.data.seqio_.evaluator import ModelAnswer

        # With several processes, which compute the same rows together, rows in one process's file must not make it skip
        # a collective computation. Parameters without an identity, as during training, have no results to resume from.
        keep = folder is not None and belongs_to is not None and jax.process_count() == 1
        path = folder / f"{task}.{kind}.partial" if keep and folder is not None else None
        if path is not None:
            partials.append(path)
        identity = {**(belongs_to or {}), "task": dataclasses.asdict(config), "asked": kind, "of": _digest(examples)}
        with AnswerCache(path, identity) as answers:
            rows = answers.complete(
                [str(number) for number in range(len(examples))],
                lambda positions: _answer(
                    program, params, evaluator, kind, [examples[position] for position in positions]
                ),
                at_once=ROWS_PER_WRITE if path is not None else len(examples),
            )
        return [ModelAnswer(tuple(tokens), score) for tokens, score in rows]

    results = evaluator.evaluate(answer)
    merged: dict[str, Any] = {"tasks": {}, "intervals": {}, "notes": evaluator.left_out}
    for result in results:
        merged["tasks"][result.name] = {**result.metrics, "examples": len(result.rows)}
        drawn = _drawn(result) if intervals else {}
        merged["intervals"] |= {f"{result.name}/{name}": bootstrap.interval(values) for name, values in drawn.items()}
        if folder is not None and jax.process_index() == 0:
            _write(folder, result, drawn)
    for path in partials:
        path.unlink(missing_ok=True)
    return merged


def _answer(
    program: Program, params: PyTree, evaluator: TaskEvaluator, kind: OutputKind, examples: Sequence[EvaluationExample]
) -> list[tuple[list[int], float]]:
    """Return (tokens, score) of each example; without the part that `kind` does not need."""
    from t5x_like.data.seqio_.evaluator import ended

    prefix_lm = has_bidirectional_prefix(program.run.data.layout)
    match kind:
        case "score":
            pairs = [(example.inputs, example.targets) for example in examples]
            return [([], score.sum) for score in score_tokens(program, params, pairs, bidirectional=prefix_lm)]
        case "predict" | "predict_with_aux":
            pass
        case unknown:
            assert_never(unknown)
    limit = evaluator.max_new_tokens
    allowed_V = np.arange(program.run.model.vocab_size) < evaluator.vocab_size
    allowed_V[0] = False  # Padding is no output.
    inputs = [example.inputs for example in examples]
    predictions = generate_tokens(
        program, params, inputs, allowed_V=allowed_V, max_new_tokens=limit, bidirectional=prefix_lm
    )
    rows = [ended(tokens, limit) for tokens in predictions]
    scores = [0.0] * len(rows)
    if kind == "predict_with_aux":
        pairs = [(prompt, list(tokens)) for prompt, tokens in zip(inputs, rows, strict=True)]
        scores = [score.sum for score in score_tokens(program, params, pairs, bidirectional=prefix_lm)]
    return [(list(tokens), score) for tokens, score in zip(rows, scores, strict=True)]


def _digest(examples: Sequence[EvaluationExample]) -> str:
    return json_digest([[example.inputs, example.targets] for example in examples])[:16]


def _drawn(result: TaskResult) -> dict[str, list[float]]:
    """Return the values of the metrics on each bootstrap draw of examples, by name."""
    drawn: dict[str, list[float]] = {}
    for function, targets, outputs in result.functions:
        drawn |= bootstrap.metric_draws(function, targets, outputs)
    return {name: values for name, values in drawn.items() if name in result.metrics}


def _write(folder: Path, result: TaskResult, drawn: Mapping[str, list[float]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{result.name}.jsonl", "".join(dumps(row) + "\n" for row in result.rows))
    document = {"task": result.name, "examples": len(result.rows), "metrics": result.metrics, "draws": drawn}
    write_atomically(folder / f"{result.name}.metrics.json", dumps(document) + "\n")
