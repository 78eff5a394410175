"""A registered seqio Task's or Mixture's own metrics, by seqio's own Evaluator. Imports TensorFlow.

The Evaluator reads and keeps examples and targets once, cuts and numbers the examples, decodes what the model says,
applies the Task's `postprocess_fn` to targets and predictions, and calls its metric functions or objects. What it asks
a model for, token ids and scores, is asked from the caller, by example number: no rows that only fill a batch come in.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import seqio

from t5x_like.config.data import DataConfig
from t5x_like.config.errors import DataError
from t5x_like.config.objectives import Layout
from t5x_like.config.seqio import EvaluationTask
from t5x_like.data.seqio_live import load_provider
from t5x_like.data.seqio_source import tokenizer_of
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.data.vocabulary import EOS_ID, PAD_ID

Features = Mapping[str, npt.NDArray[Any]]
Asked = Literal["predict", "score", "predict_with_aux"]

_ASKED: dict[Any, Asked] = {
    seqio.metrics.ModelOutputType.PREDICTION: "predict",
    seqio.metrics.ModelOutputType.SCORE: "score",
    seqio.metrics.ModelOutputType.PREDICTION_WITH_AUX: "predict_with_aux",
}


@dataclasses.dataclass(frozen=True)
class Example:
    """What a model is given of one example: token ids without padding. `targets` are what `score` asks for."""

    inputs: list[int]
    targets: list[int]


@dataclasses.dataclass(frozen=True)
class Said:
    """What a model says to one example. `tokens` end in EOS if the model has said so; `score` is a log-likelihood:
    of the Task's targets where these are scored, of `tokens` where both are asked for."""

    tokens: tuple[int, ...] = ()
    score: float = 0.0


Answer = Callable[[str, Asked, Sequence[Example]], Sequence[Said]]
"""(Task, what is asked for, its examples in order) -> what the model says to each."""


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """Of one Task.

    Attributes:
      metrics: Numbers by name.
      rows: Of each example, in order: index, inputs, and as far as there are: target, output (the decoded text),
        prediction (after `postprocess_fn`), score. Values of a Task's own types are spelled out.
      functions: (name of the outputs, metric function, targets, outputs) of the Task's functions of predictions or
        scores: what a bootstrap calls again.
    """

    name: str
    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    functions: list[tuple[Callable[..., Any], Sequence[Any], Sequence[Any]]]


class _Captured(seqio.loggers.Logger):
    """Keeps what the Evaluator hands to its loggers."""

    def __call__(self, task_name: str, step: Any, metrics: Any, dataset: Any, inferences: Any, targets: Any) -> None:
        del step, dataset
        self.found = {**getattr(self, "found", {}), task_name: (metrics, inferences, targets)}


class TaskEvaluator:
    """The examples of a Task, or of all Tasks of a Mixture that have the split and metrics, read once."""

    def __init__(self, config: EvaluationTask, data: DataConfig):
        """
        Args:
          config: Which Task and split, and how much of it.
          data: Of the run: its layout and lengths.

        Raises:
          DataError: there is no such Task, split or metric; or the Task lacks the features of the layout, asks for
            intermediate values of the model, or cannot be read.
        """
        self.config = config
        provider = load_provider(config.mixture_or_task, config.module)
        self._converter, lengths = _converter(config, data, provider)
        self.max_new_tokens = lengths["targets"]
        tasks = seqio.get_subtasks(provider)
        self.left_out = [
            f"{task.name}: {'no metric functions' if config.split in task.splits else f'no split {config.split!r}'}"
            for task in tasks
            if config.split not in task.splits or not task.metric_objs
        ]
        if len(self.left_out) == len(tasks):
            listed = "; ".join(self.left_out)
            raise DataError(
                f"{config.mixture_or_task!r}: found nothing to score ({listed}), expected a split and metrics"
            )
        for task in tasks:
            for metric in task.metric_objs:
                if metric.model_output_type not in _ASKED:
                    kind = seqio.metrics.ModelOutputType.to_str(metric.model_output_type)
                    raise DataError(
                        f"{task.name!r}: found a metric of {kind}, expected one of {', '.join(_ASKED.values())}"
                    )
        logging.getLogger("absl").addFilter(_not_about_lengths)
        try:
            self._evaluator = seqio.Evaluator(
                provider.name,
                feature_converter=self._converter,
                eval_split=config.split,
                use_cached=config.use_cached,
                sequence_length=lengths,
                num_examples=config.num_examples,
                logger_cls=[_Captured],
                log_dir="nowhere",  # Nothing is written; without a name the Evaluator takes no logger.
                # A thread of metrics beside the model would wait for the device that the model works on.
                async_compute_metrics=False,
            )
            self._examples = {
                name: [self._example(features) for _, features in dataset.as_numpy_iterator()]
                for name, dataset in self._evaluator.cached_model_datasets.items()
            }
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{config.mixture_or_task!r} cannot be evaluated: {error}") from error
        for name, examples in self._examples.items():
            if not examples:
                raise DataError(f"{name!r}: found no examples in the split {config.split!r}, expected at least one")
        self._tasks = {task.name: task for task in self._evaluator.eval_tasks}

    @property
    def tasks(self) -> list[str]:
        return list(self._tasks)

    def foreign_vocabularies(self, tokenizer: Tokenizer) -> list[str]:
        """What in the Tasks' vocabularies is not the model's: ids of another tokenizer are other text."""
        found = []
        for name, task in self._tasks.items():
            for feature in task.output_features.values():
                theirs = tokenizer_of(feature.vocabulary)
                if theirs is not None and not tokenizer.has_pieces_of(theirs):
                    found.append(f"{name}: {feature.vocabulary}")
        return sorted(set(found))

    @property
    def vocab_size(self) -> int:
        """Ids of the largest vocabulary."""
        sizes = [f.vocabulary.vocab_size for task in self._tasks.values() for f in task.output_features.values()]
        return max(map(int, sizes))

    def evaluate(self, answer: Answer) -> list[TaskResult]:
        """Asks the model, and calls the metrics.

        Raises:
          DataError: a metric function fails on what the model says.
        """
        names = {id(dataset): name for name, dataset in self._evaluator.cached_model_datasets.items()}

        def ask(what: Asked) -> Callable[..., Any]:
            def model_fn(dataset: Any, *_: Any) -> Any:
                name = names[id(dataset)]
                said = answer(name, what, self._examples[name])
                if what == "score":
                    return [(number, one.score) for number, one in enumerate(said)]
                tokens = list(enumerate(self._rectangle([one.tokens for one in said])))
                return (tokens, {"scores": [one.score for one in said]}) if what == "predict_with_aux" else tokens

            return model_fn

        try:
            self._evaluator.evaluate(
                compute_metrics=True,
                predict_fn=ask("predict"),
                score_fn=ask("score"),
                predict_with_aux_fn=ask("predict_with_aux"),
            )[0].result()
        except ValueError as error:
            raise DataError(f"{self.config.mixture_or_task!r}: {error}") from error
        (captured,) = self._evaluator.loggers
        return [self._result(name, *captured.found[name]) for name in self._tasks]

    def _rectangle(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Rows of one length, as the Evaluator makes one array of them; padding follows EOS, where decoding ends."""
        width = max(max(map(len, rows)), 1)
        return [[*row, *[PAD_ID] * (width - len(row))] for row in rows]

    def _example(self, features: Features) -> Example:
        targets = features["decoder_target_tokens"]
        scored = features["decoder_loss_weights"] > 0
        if "encoder_input_tokens" in features:
            inputs = features["encoder_input_tokens"]
            given = inputs[inputs != PAD_ID]
        else:
            given = targets[~scored & (targets != PAD_ID)]
        return Example(given.tolist(), targets[scored].tolist())

    def _result(self, name: str, metrics: Mapping[str, Any], inferences: Mapping[str, Any], targets: Any) -> TaskResult:
        numbers = {
            key: float(metric.value)
            for key, metric in metrics.items()
            if isinstance(metric, seqio.metrics.Scalar) and np.ndim(metric.value) == 0
        }
        inferred = {key: values for key, values in inferences.items() if key in ("output", "prediction", "score")}
        task, examples = self._tasks[name], self._examples[name]
        spelled = task.output_features.get("inputs")
        rows = []
        for index, example in enumerate(examples):
            row: dict[str, Any] = {"index": index}
            row["inputs"] = spelled.vocabulary.decode(example.inputs) if spelled and example.inputs else ""
            row |= {"target": _plain(targets[index])} if targets is not None else {}
            row |= {key: _plain(values[index]) for key, values in inferred.items()}
            rows.append(row)
        functions: list[tuple[Callable[..., Any], Sequence[Any], Sequence[Any]]] = []
        if targets is not None:
            for kind, key in (("predict_metric_fns", "prediction"), ("score_metric_fns", "score")):
                functions += [(fn, targets, inferred[key]) for fn in getattr(task, kind) if key in inferred]
        return TaskResult(name, numbers, rows, functions)


def _converter(config: EvaluationTask, data: DataConfig, provider: Any) -> tuple[Any, dict[str, int]]:
    """seqio's feature converter of the layout, and lengths of the Task's features."""
    has, layout = set(provider.output_features), data.layout
    inputs = config.inputs_length or data.inputs_length
    targets = config.targets_length or data.targets_length or data.row_length
    if "targets" not in has or layout == "encoder" or (layout == "encoder_decoder" and "inputs" not in has):
        needed = "a decoder" if layout == "encoder" else "the features inputs and targets"
        found = f"features {', '.join(sorted(has))} and the layout {layout}"
        raise DataError(f"{config.mixture_or_task!r}: found {found}, expected {needed}")
    if "inputs" not in has:
        return seqio.LMFeatureConverter(pack=False), {"targets": targets}
    converters: dict[Layout, Callable[..., Any]] = {
        "encoder_decoder": seqio.EncDecFeatureConverter,
        "prefix_lm": seqio.PrefixLMFeatureConverter,
        "causal_lm": seqio.PrefixLMFeatureConverter,
    }
    return converters[layout](pack=False), {"inputs": inputs, "targets": targets}


def _not_about_lengths(record: logging.LogRecord) -> bool:
    """The Evaluator suggests to leave the lengths out, which are those of training here; and to name loggers."""
    return "sequence lengths" not in record.getMessage()


def _plain(value: Any) -> Any:
    """A value that JSON can hold."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def ended(tokens: Sequence[int], limit: int) -> tuple[int, ...]:
    """Tokens that a decoder has said, with the EOS that it ended by, if it did so before its limit."""
    return (*tokens, EOS_ID) if len(tokens) < limit else tuple(tokens)
