"""seqio Tasks' metrics of a set of parameters: their examples through our decoding and scoring.

TensorFlow comes in with the first Task; without Tasks this imports neither it nor seqio.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from t5x_like.config import DataConfig, DataError
from t5x_like.config.seqio import EvaluationTask
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.decoding.generate import generate_tokens
from t5x_like.decoding.scoring import score_tokens
from t5x_like.evaluation import bootstrap
from t5x_like.evaluation.rows import AT_ONCE, Answers
from t5x_like.monitoring.records import dumps
from t5x_like.program import Program
from t5x_like.run_directory import write_atomically

if TYPE_CHECKING:
    from t5x_like.data.seqio_evaluation import Example, Said, TaskEvaluator, TaskResult

Tree = Any


@functools.lru_cache(maxsize=8)
def open_task(config: EvaluationTask, data: DataConfig) -> TaskEvaluator:
    """The Task's examples, read once per process however many checkpoints are evaluated.

    Raises:
      DataError: see `seqio_evaluation.TaskEvaluator`.
    """
    from t5x_like.data.seqio_evaluation import TaskEvaluator

    return TaskEvaluator(config, data)


def require_vocabulary(evaluator: TaskEvaluator, program: Program, tokenizer: Tokenizer | None) -> None:
    """Raises DataError where the Task's ids are not the model's."""
    foreign = [] if tokenizer is None else evaluator.foreign_vocabularies(tokenizer)
    if foreign:
        raise DataError(
            f"{evaluator.config.mixture_or_task!r}: found another vocabulary than the model's ({'; '.join(foreign)}), "
            "by whose ids it would read other text; register the Task with the run's own: the spiece.model of its "
            "store, or seqio.ByteVocabulary"
        )
    if evaluator.vocab_size > program.run.model.vocab_size:
        raise DataError(
            f"{evaluator.config.mixture_or_task!r}: found a vocabulary of {evaluator.vocab_size:,} ids, expected at "
            f"most the {program.run.model.vocab_size:,} of the model"
        )


def evaluate_task(
    program: Program,
    params: Tree,
    config: EvaluationTask,
    *,
    tokenizer: Tokenizer | None = None,
    folder: Path | None = None,
    belongs_to: Mapping[str, Any] | None = None,
    intervals: bool = False,
) -> dict[str, Any]:
    """The metrics of a Task, or of each Task of a Mixture.

    Predictions are greedy, as T5X's are by default, up to `targets_length` tokens; a score is the summed log-likelihood
    of the targets. Of `predict_with_aux`, aux_values["scores"] has the log-likelihood of what was said.

    Args:
      tokenizer: Of the model, by which the Task's vocabulary is checked; None: only its size is.
      folder: Gets the rows, TASK.jsonl, and while the model works TASK.KIND.partial: one that was killed goes on from
        there. None: nothing is written.
      belongs_to: Which parameters the rows are of; None: no partial files are kept.
      intervals: Bootstrap the metrics over the examples.

    Returns:
      tasks: {Task: {metric: value, "examples": count}}
      intervals: {"Task/metric": (low, high) or None}
      notes: Tasks of the Mixture that were left out.

    Raises:
      UserError: see `open_task`, `require_vocabulary`; or a file cannot be written.
    """
    evaluator = open_task(config, program.run.data)
    require_vocabulary(evaluator, program, tokenizer)
    partials: list[Path] = []

    def answer(task: str, asked: str, examples: Sequence[Example]) -> list[Said]:
        from t5x_like.data.seqio_evaluation import Said

        # Several processes work on the same rows: what one of them finds on its disk must not let it skip a step. And
        # parameters that are not known again, as those of a step in training, have no answers to go on with.
        keep = folder is not None and belongs_to is not None and jax.process_count() == 1
        path = folder / f"{task}.{asked}.partial" if keep and folder is not None else None
        if path is not None:
            partials.append(path)
        account = {**(belongs_to or {}), "task": dataclasses.asdict(config), "asked": asked, "of": _digest(examples)}
        with Answers(path, account) as answers:
            rows = answers.complete(
                [str(number) for number in range(len(examples))],
                lambda places: _say(program, params, evaluator, asked, [examples[place] for place in places]),
                at_once=AT_ONCE if path is not None else len(examples),
            )
        return [Said(tuple(tokens), score) for tokens, score in rows]

    results = evaluator.evaluate(answer)
    found: dict[str, Any] = {"tasks": {}, "intervals": {}, "notes": evaluator.left_out}
    for result in results:
        found["tasks"][result.name] = {**result.metrics, "examples": len(result.rows)}
        drawn = _drawn(result) if intervals else {}
        found["intervals"] |= {f"{result.name}/{name}": bootstrap.interval(values) for name, values in drawn.items()}
        if folder is not None and jax.process_index() == 0:
            _write(folder, result, drawn)
    for path in partials:
        path.unlink(missing_ok=True)
    return found


def _say(
    program: Program, params: Tree, evaluator: TaskEvaluator, asked: str, examples: Sequence[Example]
) -> list[tuple[list[int], float]]:
    """(tokens, score) of each example, as far as they are asked for."""
    from t5x_like.data.seqio_evaluation import ended

    prefix_lm = program.run.data.layout == "prefix_lm"
    if asked == "score":
        pairs = [(example.inputs, example.targets) for example in examples]
        return [([], score.sum) for score in score_tokens(program, params, pairs, bidirectional=prefix_lm)]
    limit = evaluator.max_new_tokens
    allowed_V = np.arange(program.run.model.vocab_size) < evaluator.vocab_size
    allowed_V[0] = False  # Padding says nothing.
    inputs = [example.inputs for example in examples]
    said = generate_tokens(program, params, inputs, allowed_V=allowed_V, max_new_tokens=limit, bidirectional=prefix_lm)
    rows = [ended(tokens, limit) for tokens in said]
    scores = [0.0] * len(rows)
    if asked == "predict_with_aux":
        pairs = [(given, list(tokens)) for given, tokens in zip(inputs, rows, strict=True)]
        scores = [score.sum for score in score_tokens(program, params, pairs, bidirectional=prefix_lm)]
    return [(list(tokens), score) for tokens, score in zip(rows, scores, strict=True)]


def _digest(examples: Sequence[Example]) -> str:
    text = json.dumps([[example.inputs, example.targets] for example in examples])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _drawn(result: TaskResult) -> dict[str, list[float]]:
    """Values of the metrics on each draw of examples, by the metrics' names."""
    drawn: dict[str, list[float]] = {}
    for function, targets, outputs in result.functions:
        drawn |= bootstrap.of_metric(function, targets, outputs)
    return {name: values for name, values in drawn.items() if name in result.metrics}


def _write(folder: Path, result: TaskResult, drawn: Mapping[str, list[float]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{result.name}.jsonl", "".join(dumps(row) + "\n" for row in result.rows))
    document = {"task": result.name, "examples": len(result.rows), "metrics": result.metrics, "draws": drawn}
    write_atomically(folder / f"{result.name}.metrics.json", dumps(document) + "\n")
