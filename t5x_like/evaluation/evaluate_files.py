"""`t5x-like eval MODEL --data FILES`: a model's answers to the rows of files, scored by any metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, assert_never

from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.config import TaskHeadConfig
from t5x_like.decoding.generation_config import GenerationConfig
from t5x_like.decoding.pipeline import TextGenerator
from t5x_like.decoding.prompt_reader import PromptRequest
from t5x_like.decoding.prompted_model import formats_of, open_prompted
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.evaluation import bootstrap
from t5x_like.evaluation.head_model import open_head, require_head
from t5x_like.evaluation.input_rows import InputRow, InputRows
from t5x_like.evaluation.predict_files import target_field as own_target_field
from t5x_like.evaluation.predict_files import text_field as own_text_field
from t5x_like.evaluation.score_predictions import CONFUSION, require_metrics, score_rows
from t5x_like.model_loading import LoadedModel, open_model

_NEW_TOKENS = 64
"""Longest answer of a model that is not a run, in tokens."""
_CHUNK = 256


def evaluate_files(
    model: CheckpointRef,
    patterns: Sequence[str],
    metrics: Sequence[str] = (),
    *,
    inputs_field: str | None = None,
    target_field: str | None = None,
    draws: int = bootstrap.DRAWS,
) -> dict[str, Any]:
    """Return the scores of a model's answers to the rows of files.

    A task head predicts; a model of text answers each input greedily, by up to as many tokens as its targets had in
    training.

    Args:
      patterns: Files of any format that has fields.
      metrics: Names; empty: those of the head's kind, or the accuracy of whole answers.
      inputs_field, target_field: Fields or templates of the inputs and of the true answers; None: those of the run's
        own data.
      draws: Number of bootstrap draws.

    Returns:
      The result of `score_rows`, with the model and its step.

    Raises:
      UserError: the model, the files or the metrics cannot be used.
    """
    loaded = open_model(model)
    inputs_field = inputs_field or own_text_field(loaded)
    target_field = target_field or own_target_field(loaded)
    missing = [name for name, value in (("inputs", inputs_field), ("target", target_field)) if value is None]
    if inputs_field is None or target_field is None:
        options = " and ".join(f"--{name}-field" for name in missing)
        raise ConfigError([ConfigProblem(options, "nothing", "the fields of the files, as the model names none")])
    names = list(metrics) or _default_metrics(loaded)
    require_metrics(names)
    source = InputRows(patterns, inputs_field, target_field, text_option="inputs-field")
    source.check()
    rows = list(source)
    step, predictions = _generated(loaded, rows) if loaded.model.task_head is None else _predicted(loaded, rows)
    scored = [
        (row.where, {"target": row.target, **prediction}) for row, prediction in zip(rows, predictions, strict=True)
    ]
    scores = score_rows(", ".join(patterns), scored, names, draws=draws)
    return {"model": str(model.path), "step": step, **scores}


def _default_metrics(loaded: LoadedModel) -> list[str]:
    if loaded.model.task_head is None:
        return ["accuracy"]
    head = require_head(loaded)
    match head.kind:
        case "classification":
            return ["accuracy", "f1_macro", "calibration", CONFUSION]
        case "token_classification":
            return ["entity_f1", "word_accuracy"] if _are_entities(head) else ["word_accuracy"]
        case "regression":
            return ["pearson", "spearman"]
        case "embedding":
            raise AssertionError("refused by require_head")
        case unknown:
            assert_never(unknown)


def _are_entities(head: TaskHeadConfig) -> bool:
    return any(label.startswith("B-") for label in head.labels)


def _predicted(loaded: LoadedModel, rows: Sequence[InputRow]) -> tuple[int, list[dict[str, Any]]]:
    head = open_head(loaded)
    predictions: list[dict[str, Any]] = []
    for first in range(0, len(rows), _CHUNK):
        predictions += head.predict([row.text for row in rows[first : first + _CHUNK]])
    return head.step, predictions


def _generated(loaded: LoadedModel, rows: Sequence[InputRow]) -> tuple[int, list[dict[str, Any]]]:
    formats = formats_of(loaded, None)
    model = open_prompted(loaded)
    data = loaded.trained_on
    longest = _NEW_TOKENS if data is None else data.targets_length
    step, params = model.load()
    generator = TextGenerator(model, params, formats, GenerationConfig(max_new_tokens=longest, raw_text=True))
    predictions: list[dict[str, Any]] = []
    for first in range(0, len(rows), _CHUNK):
        requests = [PromptRequest(row.text, {}, where=row.where) for row in rows[first : first + _CHUNK]]
        predictions += [{"prediction": answers[0].text} for answers in generator(requests, first)]
    return step, predictions
