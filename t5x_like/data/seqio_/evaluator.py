"""Metrics of a registered seqio Task or Mixture, computed by seqio's Evaluator. Imports TensorFlow.

The Evaluator reads and caches examples and targets, trims and numbers the examples, decodes the model's outputs,
applies the Task's `postprocess_fn` to targets and predictions, and calls its metric functions or objects. The caller
supplies the token ids and scores of the model, by example number, so that no rows of padding are involved.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, assert_never

import numpy as np
import seqio

from t5x_like.config.data import DataConfig
from t5x_like.config.seqio_task import EvaluationTask
from t5x_like.data.seqio_.live_dataset import load_provider
from t5x_like.data.sources.tfds_and_seqio import tokenizer_of
from t5x_like.data.tokenizers.tokenizer import TokenizerProtocol, have_same_pieces
from t5x_like.data.tokenizers.vocabulary import EOS_ID, PAD_ID
from t5x_like.errors import DataError
from t5x_like.utils.stall_limit import stall_seconds
from t5x_like.utils.type_aliases import Features

OutputKind = Literal["predict", "score", "predict_with_aux"]

_OUTPUT_KINDS: dict[Any, OutputKind] = {
    seqio.metrics.ModelOutputType.PREDICTION: "predict",
    seqio.metrics.ModelOutputType.SCORE: "score",
    seqio.metrics.ModelOutputType.PREDICTION_WITH_AUX: "predict_with_aux",
}


@dataclasses.dataclass(frozen=True)
class EvaluationExample:
    """Example as the model receives it: token ids without padding. `targets` are the tokens that "score"
    scores."""

    inputs: list[int]
    targets: list[int]


@dataclasses.dataclass(frozen=True)
class ModelAnswer:
    """Answer of a model to one example.

    Attributes:
      tokens: Generated token ids, which end in EOS if the model generated it.
      score: Log-likelihood of the Task's targets for "score", of `tokens` for "predict_with_aux".
    """

    tokens: tuple[int, ...] = ()
    score: float = 0.0


AnswerFn = Callable[[str, OutputKind, Sequence[EvaluationExample]], Sequence[ModelAnswer]]
"""Maps (Task, kind of output, its examples in order) to an answer for each example."""


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """Result of one Task.

    Attributes:
      name: Name of the Task.
      metrics: Values by name.
      rows: For each example, in order: index, inputs, and if they exist target, output (the decoded text), prediction
        (after `postprocess_fn`) and score. Values of a Task's own types are converted to text.
      functions: (metric function, targets, outputs) of the Task's functions of predictions or scores, for the
        bootstrap.
    """

    name: str
    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    functions: list[tuple[Callable[..., Any], Sequence[Any], Sequence[Any]]]


class _CapturingLogger(seqio.loggers.Logger):
    """Keeps the results that the Evaluator passes to its loggers."""

    def __call__(self, task_name: str, step: Any, metrics: Any, dataset: Any, inferences: Any, targets: Any) -> None:
        del step, dataset
        self.results = {**getattr(self, "results", {}), task_name: (metrics, inferences, targets)}


class TaskEvaluator:
    """Evaluator of a Task, or of all Tasks of a Mixture that have the split and metrics. Examples are read once."""

    def __init__(self, config: EvaluationTask, data: DataConfig):
        """
        Args:
          config: Task, split and number of examples.
          data: Layout and lengths of the run.

        Raises:
          DataError: the Task, split or metric does not exist; or the Task lacks the features of the layout, needs
            intermediate values of the model, or cannot be read.
        """
        self.config = config
        provider = load_provider(config.mixture_or_task, config.module, "evaluation.tasks")
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
                if metric.model_output_type not in _OUTPUT_KINDS:
                    kind = seqio.metrics.ModelOutputType.to_str(metric.model_output_type)
                    raise DataError(
                        f"{task.name!r}: found a metric of {kind}, expected one of {', '.join(_OUTPUT_KINDS.values())}"
                    )
        logging.getLogger("absl").addFilter(_hides_length_advice)
        try:
            self._evaluator = seqio.Evaluator(
                provider.name,
                feature_converter=self._converter,
                eval_split=config.split,
                use_cached=config.use_cached,
                sequence_length=lengths,
                num_examples=config.num_examples,
                logger_cls=[_CapturingLogger],
                log_dir="unused",  # Nothing is written, but the Evaluator uses loggers only if a folder is named.
                # A separate thread for metrics would compete with the model for the device.
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

    def foreign_vocabularies(self, tokenizer: TokenizerProtocol) -> list[str]:
        """Return the Tasks' vocabularies that differ from the model's. Their ids would stand for other text."""
        foreign = set()
        for name, task in self._tasks.items():
            for feature in task.output_features.values():
                task_tokenizer = tokenizer_of(feature.vocabulary)
                if task_tokenizer is not None and not have_same_pieces(tokenizer, task_tokenizer):
                    foreign.add(f"{name}: {feature.vocabulary}")
        return sorted(foreign)

    @property
    def vocab_size(self) -> int:
        """Number of ids of the largest vocabulary."""
        sizes = [f.vocabulary.vocab_size for task in self._tasks.values() for f in task.output_features.values()]
        return max(map(int, sizes))

    def evaluate(self, answer_fn: AnswerFn) -> list[TaskResult]:
        """Query the model and compute the metrics.

        Raises:
          DataError: a metric function fails on the model's outputs.
        """
        names = {id(dataset): name for name, dataset in self._evaluator.cached_model_datasets.items()}

        def model_fn_for(kind: OutputKind) -> Callable[..., Any]:
            def model_fn(dataset: Any, *_: Any) -> Any:
                name = names[id(dataset)]
                answers = answer_fn(name, kind, self._examples[name])
                if kind == "score":
                    return [(number, answer.score) for number, answer in enumerate(answers)]
                tokens = list(enumerate(self._pad([answer.tokens for answer in answers])))
                if kind == "predict_with_aux":
                    return tokens, {"scores": [answer.score for answer in answers]}
                return tokens

            return model_fn

        try:
            self._evaluator.evaluate(
                compute_metrics=True,
                predict_fn=model_fn_for("predict"),
                score_fn=model_fn_for("score"),
                predict_with_aux_fn=model_fn_for("predict_with_aux"),
            )[0].result(timeout=stall_seconds())
        except ValueError as error:
            raise DataError(f"{self.config.mixture_or_task!r}: {error}") from error
        except TimeoutError:
            raise DataError(
                f"{self.config.mixture_or_task!r}: found metrics that take longer than {stall_seconds():g} s, expected "
                "less; increase --stall-timeout"
            ) from None
        (captured,) = self._evaluator.loggers
        return [self._result(name, *captured.results[name]) for name in self._tasks]

    def _pad(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return rows of equal length, since the Evaluator makes an array of them. Padding follows EOS and is
        ignored."""
        width = max(max(map(len, rows)), 1)
        return [[*row, *[PAD_ID] * (width - len(row))] for row in rows]

    def _example(self, features: Features) -> EvaluationExample:
        targets = features["decoder_target_tokens"]
        scored = features["decoder_loss_weights"] > 0
        if "encoder_input_tokens" in features:
            inputs = features["encoder_input_tokens"]
            input_ids = inputs[inputs != PAD_ID]
        else:
            input_ids = targets[~scored & (targets != PAD_ID)]
        return EvaluationExample(input_ids.tolist(), targets[scored].tolist())

    def _result(self, name: str, metrics: Mapping[str, Any], inferences: Mapping[str, Any], targets: Any) -> TaskResult:
        numbers = {
            key: float(metric.value)
            for key, metric in metrics.items()
            if isinstance(metric, seqio.metrics.Scalar) and np.ndim(metric.value) == 0
        }
        inferred = {key: values for key, values in inferences.items() if key in ("output", "prediction", "score")}
        task, examples = self._tasks[name], self._examples[name]
        inputs_feature = task.output_features.get("inputs")
        rows = []
        for index, example in enumerate(examples):
            row: dict[str, Any] = {"index": index}
            row["inputs"] = (
                inputs_feature.vocabulary.decode(example.inputs) if inputs_feature and example.inputs else ""
            )
            row |= {"target": _plain(targets[index])} if targets is not None else {}
            row |= {key: _plain(values[index]) for key, values in inferred.items()}
            rows.append(row)
        functions: list[tuple[Callable[..., Any], Sequence[Any], Sequence[Any]]] = []
        if targets is not None:
            for kind, key in (("predict_metric_fns", "prediction"), ("score_metric_fns", "score")):
                functions += [(fn, targets, inferred[key]) for fn in getattr(task, kind) if key in inferred]
        return TaskResult(name, numbers, rows, functions)


def _converter(config: EvaluationTask, data: DataConfig, provider: Any) -> tuple[Any, dict[str, int]]:
    """Return seqio's feature converter for the layout, and the lengths of the Task's features."""
    features, layout = set(provider.output_features), data.layout
    inputs = config.inputs_length or data.inputs_length
    targets = config.targets_length or data.targets_length or data.row_length
    if "targets" not in features or layout == "encoder" or (layout == "encoder_decoder" and "inputs" not in features):
        needed = "a decoder" if layout == "encoder" else "the features inputs and targets"
        found = f"features {', '.join(sorted(features))} and the layout {layout}"
        raise DataError(f"{config.mixture_or_task!r}: found {found}, expected {needed}")
    if "inputs" not in features:
        return seqio.LMFeatureConverter(pack=False), {"targets": targets}
    lengths = {"inputs": inputs, "targets": targets}
    match layout:
        case "encoder_decoder":
            return seqio.EncDecFeatureConverter(pack=False), lengths
        case "prefix_lm" | "causal_lm":
            return seqio.PrefixLMFeatureConverter(pack=False), lengths
        case unknown:
            assert_never(unknown)


def _hides_length_advice(record: logging.LogRecord) -> bool:
    """Return False for the Evaluator's advice to omit the lengths: evaluation uses the lengths of training here."""
    return "sequence lengths" not in record.getMessage()


def _plain(value: Any) -> Any:
    """Return the value as JSON can represent it."""
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
    """Return generated tokens with EOS appended if generation ended before its limit."""
    return (*tokens, EOS_ID) if len(tokens) < limit else tuple(tokens)
